"""The front door on networks of random weights: what it loads, what it refuses, and what it gives back.

That its pictures are those of the nodes, to the byte, is tests/demo/test_door.py.
"""

import logging
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import (
    CascadeError,
    Control,
    Interrupted,
    StableCascade,
    StageProgress,
    StageSettings,
)
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.model_files import ModelFiles
from cascade_nodes.cascade_core.pictures import as_image
from cascade_nodes.demo.door import WEIGHTS
from cascade_nodes.headless.pictures import read_image

FEW = StageSettings(steps=2, cfg=2.0, cfg_rescale=0.0)


@pytest.fixture(scope="module")
def cascade():
    with StableCascade.load(WEIGHTS, device="cpu", prior=FEW, decoder=FEW, size=(64, 64)) as opened:
        yield opened


def call(cascade: StableCascade, **inputs) -> torch.Tensor:
    return cascade("a red star", output="tensor", **inputs)


def refused(cascade: StableCascade, message: str, inputs: dict[str, Any]) -> None:
    """A call with these inputs is refused before a step is taken."""
    steps = []
    with pytest.raises(CascadeError, match=message):
        cascade(**{"prompt": "a red star", "callback": steps.append, **inputs})
    assert not steps


def test_nothing_is_loaded_before_it_is_needed():
    cascade = StableCascade.load(WEIGHTS, prior=FEW, size=(64, 64))
    assert not cascade._loaded
    cascade.prior("a red star")
    assert {role for role, _ in cascade._loaded} == {"stage_c", "text_encoder"}


def test_each_network_is_loaded_once(cascade):
    call(cascade)
    networks = dict(cascade._loaded)
    call(cascade, seed=1)
    assert all(cascade._loaded[key] is network for key, network in networks.items())


def test_syntax_of_other_programs_is_told_of_once(cascade, caplog):
    cascade.prior(["a <lora:x:0.8> star BREAK"] * 2, negative="a (blue:1.2) star")
    (notice,) = caplog.messages
    assert "'<lora:x:0.8>' is read as words; a LoRA is applied by" in notice
    assert "add_lora" in notice
    assert "'BREAK' is read as a word" in notice


def test_both_prompts_are_encoded_in_one_pass(cascade):
    """So that a text encoder whose weights are streamed is read once."""
    passes: list[int] = []
    model = cascade.text_stage().encoder.model.text_model
    handle = model.register_forward_hook(lambda _, __, output: passes.append(len(output.last_hidden_state)))
    try:
        cascade.prior(["a (red:1.3) star", "a blue star"], negative="a circle")
    finally:
        handle.remove()
    assert passes == [4]  # both prompts, the empty one that the weight needs, the negative one


def test_a_call_is_its_stages_one_after_the_other(cascade):
    latent = cascade.prior("a red star", seed=4)
    assert latent.shape == (1, 16, 2, 2)
    decoded = cascade.decode(latent, "a red star", seed=4, output="tensor")
    assert torch.equal(call(cascade, seed=4), decoded)
    assert decoded.shape == (1, 64, 64, 3)
    pictures = cascade("a red star", seed=4)
    assert [picture.size for picture in pictures] == [(64, 64)]


def test_a_picture_does_not_depend_on_its_batch(cascade):
    together = call(cascade, seed=4, batch=2)
    assert (together[1] - call(cascade, seed=5)[0]).abs().max() <= 1e-4
    of_two = cascade(["a red star", "a blue ring"], seed=4, output="tensor")
    assert (of_two[0] - together[0]).abs().max() <= 1e-4


def test_settings_of_a_call_are_the_stage_c_ones(cascade):
    plain = cascade.prior("a red star")
    for changed in ({"steps": 3}, {"cfg": 3.0}, {"shift": 2.0}, {"sampler": "ddim"}, {"cfg_rescale": 1.0}):
        assert not torch.equal(cascade.prior("a red star", **changed), plain)
    settings = {"steps": 2, "cfg": 2.0, "cfg_rescale": 0.0, "shift": 1.0, "sampler": "ddpm"}
    assert torch.equal(cascade.prior("a red star", **settings), plain)


def test_inpainting_changes_nothing_outside_the_mask(cascade):
    image = torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(96, 96)
    mask[24:72, 24:72] = 1
    painted = call(cascade, image=image, mask=mask)
    assert torch.equal(painted[:, mask == 0], image[:, mask == 0])
    assert not torch.equal(painted[:, mask == 1], image[:, mask == 1])


def test_room_is_added_at_the_sides_that_are_named(cascade):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    painted = call(cascade, image=image, room=(0, 0, 64, 0))
    assert painted.shape == (1, 64, 128, 3)
    assert torch.equal(painted[:, :, :32], image[:, :, :32])  # beyond the feather


def test_picture_prompts_count_by_their_strength(cascade):
    image = torch.rand(1, 64, 64, 3)
    plain = cascade.prior("a red star")
    assert torch.equal(cascade.prior("a red star", image_prompts=[(image, 0.0)]), plain)
    assert not torch.equal(cascade.prior("a red star", image_prompts=[image]), plain)


def test_controls_count_by_strength_and_range(cascade):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    plain = cascade.prior("a red star")

    def controlled(**inputs) -> torch.Tensor:
        control = Control("demo_controlnet_canny.safetensors", image, **inputs)
        return cascade.prior("a red star", controls=[control])

    assert torch.equal(controlled(strength=0.0), plain)
    assert torch.equal(controlled(end=0.0), plain)
    assert not torch.equal(controlled(), plain)
    with pytest.raises(CascadeError, match=r"controls\[0\] has start 0\.8 and end 0\.2"):
        controlled(start=0.8, end=0.2)
    with pytest.raises(CascadeError, match="was given no picture"):
        cascade.prior("a red star", controls=[Control("demo_controlnet_canny.safetensors")])


def test_loras_are_added_and_removed(cascade):
    plain = cascade.prior("a red star")
    name = cascade.add_lora("demo_lora_house.safetensors", 0.7)
    assert cascade.loras == (name,)
    assert not torch.equal(cascade.prior("a red star"), plain)
    cascade.remove_lora(name)
    assert torch.equal(cascade.prior("a red star"), plain)
    with pytest.raises(CascadeError, match="No LoRA 'x' is applied"):
        cascade.remove_lora("x")


def test_a_learned_token_is_told_by_name(cascade, caplog):
    with caplog.at_level(logging.INFO, "cascade_nodes"):
        name = cascade.add_lora("demo_token_loop.safetensors")
    assert "Write [loop] in the prompt." in caplog.text
    cascade.remove_lora(name)


def test_progress_previews_and_cancelling(cascade):
    steps = []
    call(cascade, callback=lambda progress: steps.append((progress.stage, progress.step, progress.steps)))
    assert steps == [("stage_c", 1, 2), ("stage_c", 2, 2), ("stage_b", 1, 2), ("stage_b", 2, 2)]
    sizes = []
    call(cascade, callback=lambda progress: sizes.append(progress.preview().size))
    assert sizes == [(16, 16), (16, 16), (64, 64), (64, 64)]
    with pytest.raises(Interrupted):
        call(cascade, callback=lambda progress: False)
    with pytest.raises(Interrupted):
        call(cascade, callback=lambda progress: cascade.cancel())

    def encode_when_cancelled(progress: StageProgress) -> None:
        cascade.cancel()
        cascade.encode(torch.rand(64, 64, 3))

    with pytest.raises(Interrupted):
        call(cascade, callback=encode_when_cancelled)
    call(cascade)  # as if nothing had been


def test_two_threads_take_turns(cascade):
    expected = [call(cascade, seed=seed) for seed in range(3)]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.__setitem__(seed, call(cascade, seed=seed)))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(3))


def test_a_closed_cascade_says_so():
    with StableCascade.load(WEIGHTS) as cascade:
        cascade.encode(torch.rand(64, 64, 3))
    assert not cascade._loaded
    with pytest.raises(CascadeError, match="was closed; load it again"):
        cascade("a red star")


def test_a_cascade_that_is_dropped_is_gone_at_once():
    cascade = StableCascade.load(WEIGHTS, prior=FEW, size=(64, 64))
    reference = weakref.ref(cascade)
    del cascade
    assert reference() is None


def test_a_preview_loads_nothing_once_the_cascade_is_closed():
    steps: list[StageProgress] = []
    with StableCascade.load(WEIGHTS, prior=FEW, size=(64, 64)) as cascade:
        cascade.prior("a red star", callback=steps.append)
    with pytest.raises(CascadeError, match="was closed"):
        steps[-1].preview()
    assert not cascade._loaded


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"size": (100, 64)}, "each side must be a multiple of 8"),
        ({"size": (8, 8)}, "makes none with a side under"),
        ({"denoise": 1.5}, "denoise is 1.5; give a number from 0 to 1"),
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of"),
        ({"mask": torch.ones(64, 64)}, "mask was given without image"),
        ({"batch": 0}, "batch is 0"),
        ({"tile_size": 32}, "tile_size is 32; give 0 for no tiles, or 128 or more"),
        ({"output": "jpeg"}, "output is 'jpeg'; choose 'pil' or 'tensor'"),
        ({"image": "nowhere.png", "denoise": 0.5}, "nowhere.png cannot be read"),
        ({"room": (0, 0, 8, 0)}, "room is for an image without a mask"),
        ({"image": torch.rand(64, 64, 3), "room": (8, 8)}, r"give \(left, top, right, bottom\)"),
        ({"image": torch.rand(64, 64, 3), "room": (0, 0, 10**6, 0)}, "a side above 16384 pixels"),
        ({"image": torch.zeros(64, 64, 3, dtype=torch.int16)}, "image holds values of torch.int16"),
        ({"image": Image.new("RGB", (0, 0))}, "has no pixels"),
        ({"image": torch.rand(64, 64, 3), "mask": torch.full((64, 64), torch.nan)}, "mask holds NaN"),
        (
            {"image": torch.rand(64, 64, 3), "mask": torch.tensor([[0, 255]])},
            "mask holds values from 0 to 255",
        ),
        ({"image": torch.rand(64, 64, 3), "mask": torch.ones(64, 64), "grow": -1}, "grow is -1"),
        ({"image": torch.rand(64, 64, 3), "mask": torch.ones(64, 64), "soft": "no"}, "soft is 'no'"),
        ({"image": torch.rand(64, 64, 3), "mask": torch.ones(64, 64), "feather": -1}, "feather is -1"),
        ({"prompt": 3}, "prompt is of type int; give text"),
        ({"prompt": ["a red star", None]}, r"prompt\[1\] is of type NoneType; give text"),
        ({"negative": ["green"]}, "negative is of type list; give text"),
        ({"size": 64}, r"size is 64; give \(width, height\)"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"steps": "3"}, "steps is '3'; give a whole number"),
        ({"cfg": "4"}, "cfg is '4'; give a number"),
        ({"decoder": {}}, "decoder is of type dict; give StageSettings"),
        ({"callback": 3}, "callback is of type int"),
        (
            {"controls": Control("demo_controlnet_canny.safetensors")},
            "controls is of type Control; give a list",
        ),
        ({"image_prompts": [(torch.rand(64, 64, 3),)]}, r"image_prompts\[0\] holds 1 values"),
        (
            {"image_prompts": [(torch.rand(64, 64, 3), torch.nan)]},
            r"The strength of image_prompts\[0\] is nan",
        ),
    ],
)
def test_what_does_not_fit_is_refused(cascade, inputs, message):
    refused(cascade, message, inputs)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"cfg": torch.nan}, {"shift": 0.0}, {"cfg_rescale": 2.0}])
def test_wrong_settings_of_stage_b_are_refused_before_stage_c_is_sampled(cascade, settings):
    refused(cascade, next(iter(settings)), {"decoder": replace(FEW, **settings)})


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ("x", "latent is of type str"),
        (torch.rand(16, 2, 2), "latent has the shape"),
        (torch.rand(1, 4, 2, 2), "latent has 4 channels"),
        (torch.full((1, 16, 2, 2), torch.nan), "latent holds NaN"),
    ],
)
def test_what_is_not_a_latent_is_refused(cascade, latent, message):
    for denoise in (0.0, 0.5):
        with pytest.raises(CascadeError, match=message):
            cascade.prior("a red star", latent=latent, denoise=denoise)
    with pytest.raises(CascadeError, match=message):
        cascade.decode(latent)


def test_a_grey_mask_changes_in_part_where_soft(cascade):
    latent = torch.ones(1, 16, 2, 2)
    white, grey = torch.ones(64, 64), torch.full((64, 64), 0.5)

    def sampled(mask, soft):
        return cascade.prior("a red star", latent=latent, mask=mask, soft=soft, steps=2)

    assert torch.equal(sampled(grey, soft=False), sampled(white, soft=False))
    assert torch.equal(sampled(white, soft=True), sampled(white, soft=False))
    assert not torch.equal(sampled(grey, soft=True), sampled(white, soft=True))


def test_a_mask_needs_the_picture_that_it_belongs_to(cascade):
    latent = torch.rand(1, 16, 2, 2)
    with pytest.raises(CascadeError, match="mask was given without image"):
        cascade.prior("a red star", mask=torch.ones(64, 64))
    with pytest.raises(CascadeError, match="mask was given without image"):
        cascade.decode(latent, mask=torch.ones(64, 64))
    assert cascade.prior("a red star", latent=latent, mask=torch.ones(64, 64)).shape == latent.shape


def test_a_lora_without_a_strength_is_refused(cascade):
    for strength in (torch.nan, "x", None):
        with pytest.raises(CascadeError, match=r"strength is .*; give a .*number"):
            cascade.add_lora("demo_lora_house.safetensors", strength)
    assert cascade.loras == ()


def test_a_token_of_another_width_is_refused_at_once(cascade, tmp_path):
    write_safetensors(tmp_path / "wide.safetensors", {"bundle_emb.[wide].clip_g": torch.ones(2, 384)}, {})
    with pytest.raises(CascadeError, match="teaches a token 384 wide"):
        cascade.add_lora(tmp_path / "wide.safetensors")
    assert cascade.loras == ()


def test_a_missing_stage_b_is_told_before_stage_c_is_sampled(tmp_path):
    for role in ("stage_c", "stage_a"):
        shutil.copy(WEIGHTS / f"demo_{role}.safetensors", tmp_path)
    text_encoder = WEIGHTS / "demo_text_encoder"
    cascade = StableCascade.load(tmp_path, prior=FEW, size=(64, 64), text_encoder=text_encoder)
    refused(cascade, "No Stage B was found", {})


def test_16_bit_grey_is_scaled_as_cascade_run_does(tmp_path):
    values = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    grey = Image.fromarray(values)
    grey.save(tmp_path / "grey.png")
    for picture in (grey, tmp_path / "grey.png"):
        assert torch.equal(as_image(picture), read_image(tmp_path / "grey.png")[0])


def test_every_image_of_a_batch_is_there_with_denoise_0(cascade):
    image = torch.rand(1, 64, 64, 3)
    assert len(cascade.prior("a red star", image=image, batch=2, denoise=0)) == 2
    assert len(call(cascade, image=image, batch=2, denoise=0)) == 2


def test_a_seed_of_numpy_is_a_seed(cascade):
    assert torch.equal(cascade.prior(seed=np.int64(3)), cascade.prior(seed=3))


def test_a_callback_owns_what_it_is_given(cascade):
    settings = {"steps": 4, "sampler": "dpmpp_2m"}
    plain = cascade.prior("a red star", **settings)
    seen = []

    def spoil(progress: StageProgress) -> None:
        seen.append(progress.latent.clone())
        progress.latent.zero_()

    assert torch.equal(cascade.prior("a red star", **settings, callback=spoil), plain)
    weight = torch.ones(1, requires_grad=True)
    (seen[-1] * weight).sum().backward()


def test_what_the_caller_has_set_for_its_own_networks_changes_nothing(cascade):
    plain = call(cascade)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(cascade), plain)
    with torch.device("meta"):
        assert torch.equal(call(cascade), plain)


def test_what_does_not_exist_is_refused_before_a_file_is_read(tmp_path):
    with pytest.raises(CascadeError, match="is not a folder"):
        StableCascade.load(tmp_path / "none")
    for folder in ("", "x" * 10**6, "a\0b", "\x1b[2J", "\ud800"):
        with pytest.raises(CascadeError, match="is not a folder; give the folder that holds") as caught:
            StableCascade.load(folder)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    with pytest.raises(CascadeError, match=r"prefer is array\(\['full'\]"):
        StableCascade.load(tmp_path, prefer=np.array(["full"]))  # type: ignore[arg-type]
    with pytest.raises(CascadeError, match="is not a role; choose among stage_c") as caught:
        StableCascade.load(tmp_path, **{"x" * 10**6: "file"})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
    with pytest.raises(CascadeError, match="dtype 'fp4' is not known"):
        StableCascade.load(tmp_path, dtype="fp4")
    with pytest.raises(CascadeError, match="device is 'gpu'; choose auto, cpu, cuda"):
        StableCascade.load(tmp_path, device="gpu")
    wrong: list[tuple[str, Any, str]] = [
        ("device", "meta", "device is 'meta'; choose auto, cpu, cuda"),
        ("device", None, "device is None; choose auto, cpu, cuda"),
        ("memory", 0, "memory is 0; give bytes above 0"),
        ("memory", [], r"memory is \[\]; give bytes above 0"),
        ("size", (65, 64), "each side must be a multiple of 8"),
        ("prior", {}, "prior is of type dict; give StageSettings"),
        ("folder", 3, "folder is of type int; give a path"),
    ]
    for name, value, message in wrong:
        with pytest.raises(CascadeError, match=message):
            StableCascade.load(**{"folder": tmp_path, name: value})
    with pytest.raises(CascadeError, match="stage_d is not a role"):
        StableCascade.load(tmp_path, stage_d="x")
    with pytest.raises(CascadeError, match=r"No text encoder was found in .*load\(…, text_encoder=path\)"):
        StableCascade.load(tmp_path).prior("a red star", size=(64, 64))


# Which file is taken


def write(path: Path, rows: int, dtype: torch.dtype) -> None:
    """A file that is taken for a previewer, as large as wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {"blocks.24.weight": torch.zeros(rows, 2, dtype=dtype)}, {})


def test_of_several_files_the_largest_in_half_precision_is_taken(tmp_path):
    write(tmp_path / "vae" / "lite.safetensors", 2, torch.bfloat16)
    write(tmp_path / "vae" / "full.safetensors", 4, torch.float32)
    write(tmp_path / "vae" / "half.safetensors", 4, torch.bfloat16)
    write(tmp_path / "other" / "larger_elsewhere.safetensors", 9, torch.bfloat16)

    def chosen(**options) -> str:
        return ModelFiles(tmp_path, **options).find("previewer").name

    assert chosen() == "half.safetensors"
    assert chosen(full_precision=True) == "full.safetensors"
    assert chosen(prefer="lite") == "lite.safetensors"
    assert chosen(chosen={"previewer": "lite.safetensors"}) == "lite.safetensors"
    assert chosen(chosen={"previewer": tmp_path / "other" / "larger_elsewhere.safetensors"}) == (
        "larger_elsewhere.safetensors"
    )
    shutil.rmtree(tmp_path / "vae")
    # Anywhere in the folder, where the usual places hold none.
    assert chosen() == "larger_elsewhere.safetensors"


def test_damaged_and_foreign_files_are_passed_over(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 32)
    assert ModelFiles(tmp_path).find_optional("stage_c") is None
    write(tmp_path / "fine.safetensors", 2, torch.float32)
    assert ModelFiles(tmp_path).find("previewer").name == "fine.safetensors"
