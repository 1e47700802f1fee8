"""The text encoder against a forward pass written out here, prompt weights, batches, files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.placement import DeviceMemory
from cascade_nodes.cascade_core.text.clip import fill_clip
from cascade_nodes.cascade_core.text.encoder import (
    TextEncoder,
    Tokenizer,
    build_text_model,
    encode_tokens,
    infer_text_config,
)
from cascade_nodes.cascade_core.text.tokenizer import build_small_vocabulary, save_vocabulary
from cascade_nodes.tests.core.placements import Counting

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY, MERGES = build_small_vocabulary(["a", "red", "blue", "star", "ring", "left", "of"])
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 48,
    "vocab_size": len(VOCABULARY),
    "hidden_act": "gelu",
}
LONG = "red star " * 50  # two chunks


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = build_text_model(config, device="meta").state_dict()
    return {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in shapes.items()}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    model = fill_clip(build_text_model(CONFIG, device="meta"), random_weights(CONFIG))
    return TextEncoder(model, Tokenizer.from_vocabulary(VOCABULARY, MERGES))


def assert_close(value: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= tolerance * reference.abs().max()


def written_out(w: dict[str, torch.Tensor], tokens: list[int], end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's text transformer on one chunk: the last layer's states (77, 64), the projected pooled vector."""
    places = torch.arange(77)
    x = w["text_model.embeddings.token_embedding.weight"][tokens]
    x = x + w["text_model.embeddings.position_embedding.weight"][places]
    mask = (places[None] <= places[:, None]) & (places <= tokens.index(end))  # causal, and no padding
    for layer in range(CONFIG["num_hidden_layers"]):

        def linear(name, h, prefix=f"text_model.encoder.layers.{layer}."):
            return F.linear(h, w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"])

        def norm(name, h, prefix=f"text_model.encoder.layers.{layer}."):
            return F.layer_norm(h, (64,), w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"])

        h = norm("layer_norm1", x)
        q, k, v = (linear(f"self_attn.{n}_proj", h).view(77, 4, 16).transpose(0, 1) for n in "qkv")
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + linear("self_attn.out_proj", (scores @ v).transpose(0, 1).reshape(77, 64))
        x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("layer_norm2", x))))
    final = (w["text_model.final_layer_norm.weight"], w["text_model.final_layer_norm.bias"])
    return x, F.layer_norm(x[tokens.index(end)], (64,), *final) @ w["text_projection.weight"].T


@pytest.mark.parametrize(
    "batches",
    [
        [["a (red:1.3) star", LONG], ["blue"], [""]],
        [["blue"], ["blue"]],
        [["star " * 75 * 20], ["a (ring:0.5)", *(f"{'a ' * n}star" for n in range(40))]],
    ],
    ids=["weights", "the same", "more than fit at once"],
)
def test_batches_in_one_pass_are_each_as_by_itself(encoder, batches):
    together = encoder.encode_each(batches)
    for prompts, encoded in zip(batches, together, strict=True):
        assert all(map(torch.equal, encoded, encoder.encode(prompts)))


def test_a_streamed_encoder_is_read_once_for_both_prompts():
    deep = {**CONFIG, "num_hidden_layers": 8}
    model = fill_clip(build_text_model(deep, device="meta"), random_weights(deep))
    encoder = TextEncoder(model, Tokenizer.from_vocabulary(VOCABULARY, MERGES))
    device = Counting(int(0.6 * sum(each.nbytes for each in encoder.model.parameters())))
    memory = DeviceMemory(device, unit_bytes=8_000)

    def read(body) -> int:
        before = device.copied
        memory.run(encoder.model, lambda _: body(), single_use=True)
        return device.copied - before

    read(lambda: encoder.encode(["blue"]))  # what stays comes once
    one = read(lambda: encoder.encode(["blue"]))
    both = read(lambda: encoder.encode_each([["blue"], ["a red star"]]))
    twice = read(lambda: [encoder.encode([prompt]) for prompt in ("blue", "a red star")])
    memory.release()
    assert 0 < one == both < twice


@pytest.mark.parametrize("prompt", ["", "a red star", "a <|endoftext|> ring", "star " * 75])
def test_states_are_unnormed_and_masked(encoder, prompt):
    tokens = [token for token, _ in encoder.tokenizer.chunks(prompt)[0]]
    states, pooled = written_out(random_weights(CONFIG), tokens, encoder.tokenizer.end_token)
    encoded = encoder.encode([prompt])
    assert_close(encoded.states[0], states)
    assert_close(encoded.pooled[0], pooled)


def test_states_are_what_transformers_calls_the_last_hidden_states(encoder):
    end = encoder.tokenizer.end_token
    tokens = torch.tensor([[token for token, _ in encoder.tokenizer.chunks("a red star")[0]]])
    mask = (torch.arange(77) <= 4).long().unsqueeze(0)
    theirs = encoder.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    ours = encode_tokens(encoder.model, tokens, end)
    assert torch.equal(ours.states, theirs.hidden_states[-1])
    assert (ours.states - theirs.last_hidden_state).abs().max() > 0.1  # those are normed
    assert_close(ours.pooled, theirs.text_embeds)


def test_weights_move_states_about_the_empty_prompts(encoder):
    plain, weighted, empty = (
        encoder.encode([prompt]) for prompt in ("a red star", "a (red:1.7) (star:-0.5)", "")
    )
    w = torch.ones(77, 1)
    w[2], w[3] = 1.7, -0.5
    assert_close(weighted.states, empty.states + w * (plain.states - empty.states))
    assert_close(weighted.pooled, plain.pooled)


def test_a_long_prompt_joins_its_chunks(encoder):
    first = encoder.encode(["red star " * 37 + "red"])  # fills the first chunk
    rest = encoder.encode(["star " + "red star " * 12])
    both = encoder.encode([LONG])
    assert_close(both.states, torch.cat([first.states, rest.states], dim=1))
    assert_close(both.pooled, first.pooled)


def test_a_batch_is_its_single_runs(encoder):
    prompts = ["a red star", LONG, "", "a (blue:1.4) ring", LONG + "left (of:0.3)", "a red star"]
    batch = encoder.encode(prompts)
    assert batch.states.shape == (6, 154, 64)
    assert batch.pooled.shape == (6, 48)
    empty = encoder.encode([""]).states[0]
    for index, prompt in enumerate(prompts):
        single = encoder.encode([prompt])
        length = single.states.shape[1]
        assert_close(batch.states[index, :length], single.states[0])
        assert_close(batch.pooled[index], single.pooled[0])
        if length == 77:
            assert_close(batch.states[index, 77:], empty)


def test_ten_thousand_words(encoder):
    """They are 134 chunks, no two alike, so more than one pass of the encoder."""
    words = ["red"] * 10_000
    for chunk in range(133):
        words[75 * chunk + chunk % 75] = "star" if chunk < 75 else "ring"
    encoded = encoder.encode([" ".join(words)])
    assert encoded.states.shape == (1, 134 * 77, 64)
    last = encoder.encode([" ".join(words[133 * 75 :])])
    assert_close(encoded.states[:, 133 * 77 :], last.states)
    assert_close(encoded.pooled, encoder.encode([" ".join(words[:75])]).pooled)


def test_gradients_reach_the_weights():
    torch.manual_seed(0)
    model = build_text_model(CONFIG)
    end = CONFIG["vocab_size"] - 1
    encoded = encode_tokens(model, torch.tensor([[end - 1, 3, end, end], [end - 1, 3, 4, end]]), end)
    (encoded.states.square().mean() + encoded.pooled.square().mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # adding to every key alike changes no softmax
    assert [name for name in missing if not name.endswith("k_proj.bias")] == []


def test_the_published_text_encoder_is_inferred():
    manifests = json.loads(gzip.decompress((GOLDEN / "checkpoint_manifests.json.gz").read_bytes()))
    shapes = {name: shape for name, (_, shape) in manifests["text_encoder_clip_bigg"].items()}
    config = infer_text_config(shapes)
    assert config == {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = build_text_model(config, device="meta")
    assert model.load_state_dict(weights, strict=True, assign=True)
    assert sum(p.numel() for p in model.parameters()) == 694_659_840
    assert model.config._attn_implementation == "sdpa"


def test_weights_are_taken_without_a_copy():
    weights = random_weights(CONFIG)
    model = fill_clip(build_text_model(CONFIG, device="meta"), weights)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {
        n: t.data_ptr() for n, t in weights.items()
    }
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("where", ["metadata", "config.json", "neighbour"])
def test_a_model_folder_is_loaded(encoder, where, tmp_path):
    folder = tmp_path / "text_encoder"
    metadata = {"kind": "text_encoder", "config": json.dumps(CONFIG)} if where == "metadata" else {}
    weights = {name: t.half() for name, t in random_weights(CONFIG).items()}
    old = {"text_model.embeddings.position_ids": torch.arange(77)}
    write_safetensors(folder / "model.safetensors", {**weights, **old}, metadata)
    if where != "metadata":
        (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **CONFIG}))
    save_vocabulary(tmp_path / "tokenizer" if where == "neighbour" else folder, VOCABULARY, MERGES)
    loaded = TextEncoder.load(folder, dtype=torch.float32)
    assert_close(
        loaded.encode(["a (red:1.2) star"]).states, encoder.encode(["a (red:1.2) star"]).states, 3e-3
    )
    assert TextEncoder.load(folder / "model.safetensors").model.dtype == torch.float16


def test_a_single_file_uses_the_bundled_vocabulary(tmp_path):
    config = {**CONFIG, "num_attention_heads": 1, "vocab_size": 49408, "hidden_act": "quick_gelu"}
    write_safetensors(tmp_path / "clip.safetensors", random_weights(config), {})
    save_vocabulary(tmp_path, VOCABULARY, MERGES)  # another model's
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # likewise
    encoder = TextEncoder.load(tmp_path / "clip.safetensors")
    assert encoder.model.config.num_attention_heads == 1
    assert encoder.tokenizer.tokens("a cat") == [320, 2368]
    assert encoder.encode(["a cat"]).states.shape == (1, 77, 64)


def test_bad_files(tmp_path):
    def load(tensors=None, metadata=None, vocabulary=True):
        tensors = random_weights(CONFIG) if tensors is None else tensors
        metadata = {"config": json.dumps(CONFIG)} if metadata is None else metadata
        write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).unlink(missing_ok=True)
        if vocabulary:
            save_vocabulary(tmp_path, VOCABULARY, MERGES)
        return TextEncoder.load(tmp_path)

    assert load().encode(["a"]).states.isfinite().all()
    lacking = random_weights(CONFIG)
    del lacking["text_projection.weight"]
    wide = {**CONFIG, "hidden_size": 96}
    cases = [
        ({"tensors": lacking}, "it lacks text_projection.weight"),
        ({"tensors": lacking, "metadata": {}}, "lacks text_projection.weight"),
        ({"tensors": random_weights(wide), "metadata": {}}, "96 wide.*number of heads cannot be told"),
        (
            {"tensors": {"vision_model.x": torch.zeros(1)}},
            "is a CLIP image encoder, but a CLIP text encoder is exp",
        ),
        (
            {"tensors": {"other": torch.zeros(1)}},
            r"holds other tensors \(first: other\), but a CLIP text encoder",
        ),
        (
            {"metadata": {"config": json.dumps({**CONFIG, "num_attention_heads": 7})}},
            "num_attention_heads is 7, which does not divide hidden_size = 64; correct the config",
        ),
        ({"metadata": {"config": json.dumps({**CONFIG, "vocab_size": 99})}}, "of another shape"),
        ({"vocabulary": False}, r"embeds \d+ tokens, not CLIP's 49408, and no tokenizer lies beside it"),
    ]
    for arguments, message in cases:
        with pytest.raises(CascadeError, match=message):
            load(**arguments)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02pickle")
    with pytest.raises(CascadeError, match="is a pickle"):
        TextEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CascadeError, match=r"no model.safetensors .*found: none"):
        TextEncoder.load(tmp_path)


def test_a_foreign_tokenizer_is_refused(encoder):
    with pytest.raises(CascadeError, match="tokenizer has 49408 tokens but the text encoder embeds"):
        TextEncoder(encoder.model, Tokenizer.bundled())


def test_nan_in_the_weights_is_named():
    weights = random_weights(CONFIG)
    weights["text_model.encoder.layers.1.mlp.fc1.bias"][3] = torch.nan
    model = fill_clip(build_text_model(CONFIG, device="meta"), weights)
    encoder = TextEncoder(model, Tokenizer.from_vocabulary(VOCABULARY, MERGES))
    with pytest.raises(CascadeError, match=r"tensor text_model.encoder.layers.1.mlp.fc1.bias holds NaN"):
        encoder.encode(["a red star"])


def test_transformers_is_imported_only_when_a_model_is_built():
    code = "import sys, cascade_nodes.cascade_core.text.encoder, cascade_nodes.cascade_core.vision; "
    code += "sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
