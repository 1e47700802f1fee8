"""Training data is the same whatever the number of cores, and a network trains from the command line."""

import json

import torch

from cascade_nodes.cascade_core.checkpoints import load_model, read_safetensors
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary
from cascade_nodes.demo import recipe, train
from cascade_nodes.demo.captions import vocabulary
from cascade_nodes.demo.dataset import as_float, captions, contrasts, pictures, resized, to_uint8, tokenise
from cascade_nodes.demo.places import contrasted
from cascade_nodes.demo.world import render, sample_scenes


def small_tokenizer():
    return Tokenizer.from_vocabulary(*build_small_vocabulary(vocabulary() | {","}))


def test_tokens_are_those_of_the_tokenizer():
    tokenizer = small_tokenizer()
    texts = [
        "a large red star",
        "",
        "a small blue ring, on the left of a huge violet donut on a sandy backdrop",
    ]
    chunks = [tokenizer.chunks(text)[0] for text in texts]
    assert tokenise(texts, tokenizer).tolist() == [[token for token, _ in chunk] for chunk in chunks]


def test_every_word_is_one_token():
    tokenizer = small_tokenizer()
    assert all(len(tokenizer.tokens(word)) == 1 for word in vocabulary())


def test_captions_are_of_their_scene_and_repeatable():
    from random import Random

    tokenizer, scenes = small_tokenizer(), sample_scenes(6, 3)
    first, repeated = (captions(scenes, 2, tokenizer, 9) for _ in range(2))
    assert first.shape == (6, 2, 77)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, captions(scenes, 2, tokenizer, 10))
    token_rows = contrasts(scenes, 3, tokenizer, 4)
    assert token_rows.shape == (6, 5, 77)
    assert torch.equal(token_rows[0], tokenise(contrasted(scenes[0], Random(4), 3), tokenizer))


def test_pictures_are_drawn_and_resized():
    scenes = sample_scenes(3, 1)
    images = render(scenes, 256)
    assert torch.equal(pictures(scenes, torch.device("cpu")), images)
    small = pictures(scenes, torch.device("cpu"), smaller=96)
    assert torch.equal(small, to_uint8(resized(as_float(images), 96)))


def test_stage_a_trains_stops_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "STAGE_A", {**recipe.STAGE_A, "c_hidden": 8, "bottleneck_blocks": 1})
    run = ["stage_a", "--work", str(tmp_path / "runs"), "--weights", str(tmp_path), "--device", "cpu"]
    run += ["--scenes", "64", "--batch-size", "2", "--steps", "3"]
    train.main([*run, "--minutes", "0"])
    _, metadata = read_safetensors(tmp_path / "runs" / "stage_a" / "state.safetensors")
    assert metadata["step"] == "0"
    train.main(run)
    _, metadata = read_safetensors(tmp_path / "runs" / "stage_a" / "state.safetensors")
    assert metadata["step"] == "3"

    tensors, metadata = read_safetensors(tmp_path / "demo_stage_a.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert json.loads(metadata["config"]) == recipe.STAGE_A
    model, kind, _ = load_model(tmp_path / "demo_stage_a.safetensors", "stage_a", torch.float32)
    assert kind == "stage_a"
    weight = model.get_parameter("down_blocks.3.1.weight")
    assert weight.tolist() == [torch.tensor(0.43).half().item()] * 4  # held, so that latents keep their scale
