"""`cascade merge`: what it writes is what a LoRA does at run time, to the bit, and what it says and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank, read_adapter, write_adapter
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.adapters.merge import MergedFile
from cascade_nodes.cascade_core.adapters.names import parameter_shapes, stage_c_shapes
from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    DIFFUSERS,
    fuse_attention,
    layout_named,
    load_model,
    networks_in,
    read_safetensors,
    read_weights,
    split_attention,
    write_safetensors,
)
from cascade_nodes.cascade_core.checkpoints.layouts import PUBLISHED
from cascade_nodes.cascade_core.networks.quantisation import E4M3, INT8, quantisable, quantised_layers
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.core.lora_files import CONFIG, STAGE_C_ABOUT, change
from cascade_nodes.tests.obstacles import memory_limited_to

TEXT_ENCODER = Path(__file__).parents[2] / "demo" / "weights" / "demo_text_encoder"
ABOUT = {"config": json.dumps(STAGE_C_ABOUT["config"]), "modelspec.title": "mine"}
LAYERS = ("clf.1", "clip_txt_mapper", "down_blocks.0.0.depthwise", "down_blocks.0.2.attention.attn.to_q",
          "down_blocks.0.2.attention.attn.to_v", "up_blocks.1.0.channelwise.4", "up_blocks.0.1.mapper")  # fmt: skip


def stage_c(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: tensor.to(dtype).contiguous() for name, tensor in StageC(CONFIG).state_dict().items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with two LoRAs of Stage C and the text encoder, one with DoRA and tokens."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    shapes = stage_c_shapes(CONFIG)
    text_shapes = parameter_shapes(TextEncoder.load(TEXT_ENCODER).model)
    layers = ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.self_attn.q_proj")
    text = {layer: change(text_shapes[layer]) for layer in layers}
    write_adapter(
        "plain.safetensors", Adapter("plain", "kohya", {n: change(shapes[n]) for n in LAYERS}, text), "kohya"
    )
    dora = {name: change(shapes[name], dora="row") for name in LAYERS[1:4]}
    tokens = (LearnedToken("[x]", torch.ones(1, 64)),)
    write_adapter("dora.safetensors", Adapter("dora", "onetrainer", dora, {}, tokens), "onetrainer")
    return tmp_path


def merge(*arguments: str) -> int:
    return main(["merge", *arguments])


def failing(*arguments: str, capsys) -> str:
    """What a merge that fails says on standard error."""
    assert merge(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


LORAS = ("--lora", "plain.safetensors", "0.7", "--lora", "dora.safetensors", "-0.3")


def as_patched(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of Stage C while both LoRAs are applied as at run time."""
    network = StageC(CONFIG).to(dtype)
    network.load_state_dict(stage_c(dtype))
    patches = [
        Patch(name, read_adapter(f"{name}.safetensors").stage_c, strength)
        for name, strength in (("plain", 0.7), ("dora", -0.3))
    ]
    with patched(network, patches):
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["published", "split", "all-in-one", "diffusers", "module."])
def test_merged_is_as_patched(layout, dtype, folder):
    """In the file's own names and dtype, also where the attention input is fused."""
    ours = stage_c(dtype)
    tensors = {
        "published": fuse_attention(ours),
        "split": ours,
        "all-in-one": {f"model.diffusion_model.{name}": tensor for name, tensor in ours.items()},
        "diffusers": layout_named("stage_c", DIFFUSERS).from_published(ours),
        "module.": {f"module.{name}": tensor for name, tensor in ours.items()} | {"step": torch.tensor(3)},
    }[layout]
    write_safetensors("in.safetensors", tensors, ABOUT)
    assert merge("in.safetensors", "out.safetensors", *LORAS) == 0
    written, _ = read_safetensors("out.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    read, expected = split_attention(read_weights("out.safetensors", "stage_c")[0]), as_patched(dtype)
    assert read.keys() == expected.keys()
    for name in expected:
        assert torch.equal(read[name].float(), expected[name].float()), name
    changed = [name for name in expected if not torch.equal(expected[name].float(), ours[name].float())]
    assert len(changed) == len(LAYERS)


def test_what_is_said_and_kept(folder, capsys):
    write_safetensors("in.safetensors", stage_c(), ABOUT | {"modelspec.hash_sha256": "0x12"})
    assert merge("in.safetensors", "out.safetensors", *LORAS) == 0
    assert capsys.readouterr().out.splitlines() == [
        "plain.safetensors (kohya): 7 layers of Stage C, 2 layers of the text encoder, rank 3; strength 0.7, of the "
        "text encoder 0.7",
        "plain.safetensors changes the text encoder too, which is left as it is; --text-encoder merges it.",
        "dora.safetensors (onetrainer): 3 layers of Stage C, rank 3, DoRA magnitudes of 3, 1 learned token ([x]); "
        "strength -0.3, of the text encoder -0.3",
        "dora.safetensors teaches tokens, which no merged file holds; load it beside, with strength_model 0.",
        "Stage C: 7 weights and biases change",
        "Written: out.safetensors",
    ]
    _, metadata = read_safetensors("out.safetensors")
    record = json.loads(metadata.pop("merged_loras"))
    assert metadata == ABOUT
    assert record[1] == {"file": "dora.safetensors", "strength_model": -0.3, "strength_clip": -0.3}
    assert merge("out.safetensors", "twice.safetensors", "--lora", "plain.safetensors") == 0
    assert len(json.loads(read_safetensors("twice.safetensors")[1]["merged_loras"])) == 3


def test_other_changes_than_low_rank_ones(folder):
    """Differences of weights and biases, as ComfyUI's trainer writes them, also of a third of the fused input."""
    torch.manual_seed(4)
    shapes = {name: tensor.shape for name, tensor in stage_c().items()}
    parameters = ("clf.1.weight", "clf.1.bias", "down_blocks.0.2.attention.attn.to_k.bias")
    tensors = {
        f"diffusion_model.{name.rpartition('.')[0]}.diff{'_b' * name.endswith('bias')}": torch.randn(
            shapes[name]
        )
        for name in parameters
    }
    write_safetensors("diff.safetensors", tensors, {})
    write_safetensors("in.safetensors", fuse_attention(stage_c()), ABOUT)
    assert merge("in.safetensors", "out.safetensors", "--lora", "diff.safetensors", "0.5") == 0
    read = split_attention(read_safetensors("out.safetensors")[0])
    expected = stage_c()
    for name, difference in zip(parameters, tensors.values(), strict=True):
        expected[name] = torch.add(expected[name], difference, alpha=0.5)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def text_as_patched(strength: float) -> dict[str, torch.Tensor]:
    encoder = TextEncoder.load(TEXT_ENCODER).model
    with patched(encoder, [Patch("plain", read_adapter("plain.safetensors").text, strength)]):
        return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def text_is(path: str, expected: dict[str, torch.Tensor]) -> bool:
    read, _ = read_weights(path, "text")
    return all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_the_text_encoder_in_a_file_of_its_own_or_in_one(folder, capsys):
    write_safetensors("in.safetensors", fuse_attention(stage_c()), ABOUT)
    plain = ("--lora", "plain.safetensors", "0.7", "0.4", "--text-encoder", str(TEXT_ENCODER))
    assert merge("in.safetensors", "out.safetensors", *plain, "--text-output", "text.safetensors") == 0
    assert text_is("text.safetensors", text_as_patched(0.4))
    assert "copy its vocab.json and merges.txt beside the new file" in capsys.readouterr().out
    assert networks_in("out.safetensors") == {"stage_c"}
    assert merge("in.safetensors", "both.safetensors", *plain, "--one-file") == 0
    assert networks_in("both.safetensors") == {"stage_c", "text"}
    assert text_is("both.safetensors", text_as_patched(0.4))
    one, both = (
        split_attention(read_weights(file, "stage_c")[0]) for file in ("out.safetensors", "both.safetensors")
    )
    assert all(torch.equal(one[name], both[name]) for name in one)
    assert {name.split(".")[0] for name in read_safetensors("both.safetensors")[0]} == {
        "model",
        "text_encoder",
    }
    # and an all-in-one is merged whole
    assert merge("both.safetensors", "again.safetensors", "--lora", "plain.safetensors", "0", "0.5") == 0
    assert read_safetensors("again.safetensors")[0].keys() == read_safetensors("both.safetensors")[0].keys()
    assert not text_is("again.safetensors", text_as_patched(0.4))
    changed = split_attention(read_weights("again.safetensors", "stage_c")[0])
    assert all(torch.equal(changed[name], both[name]) for name in both)


def test_an_all_in_one_in_one_file_or_apart(folder):
    """OpenCLIP's projection, which is stored the other way round, is merged too."""
    text, _ = read_weights(TEXT_ENCODER, "text")
    generator = torch.Generator().manual_seed(3)
    text["text_projection.weight"] = torch.randn(text["text_projection.weight"].shape, generator=generator)
    open_clip = layout_named("text", ALL_IN_ONE)
    assert open_clip.transposed
    stage = {f"model.diffusion_model.{name}": tensor for name, tensor in fuse_attention(stage_c()).items()}
    other = {"vae.mean": torch.zeros(2)}
    write_safetensors(
        "in.safetensors", {**stage, **open_clip.from_published(text), **other}, {"kind": "stage_c"}
    )
    write_safetensors("stage.safetensors", fuse_attention(stage_c()), {**ABOUT, "kind": "stage_c"})
    write_safetensors("text.safetensors", open_clip.from_published(text), {})
    unchanged = ("--lora", "plain.safetensors", "0.5", "0")
    assert merge("in.safetensors", "one.safetensors", *unchanged, "--one-file") == 0
    beside = ("--text-encoder", "text.safetensors", "--one-file")
    assert merge("stage.safetensors", "both.safetensors", *unchanged, *beside) == 0
    assert (
        merge("in.safetensors", "apart.safetensors", *unchanged, "--text-output", "of_text.safetensors") == 0
    )
    assert networks_in("apart.safetensors") == {"stage_c"}
    assert networks_in("of_text.safetensors") == {"text"}
    for name in ("one", "both", "of_text"):
        assert text_is(f"{name}.safetensors", text), name
    assert "vae.mean" in read_safetensors("one.safetensors")[0]
    assert "kind" not in read_safetensors("both.safetensors")[1]


@pytest.mark.parametrize(
    "words",
    [
        ("--lora", "plain.safetensors", "in.safetensors", "out.safetensors"),
        ("--lora", "plain.safetensors", "1", "1", "in.safetensors", "--force", "out.safetensors"),
        ("in.safetensors", "--lora", "plain.safetensors", "1", "out.safetensors"),
        ("--force", "--lora=plain.safetensors", "1", "in.safetensors", "out.safetensors"),
    ],
)
def test_files_behind_strengths(words, folder):
    write_safetensors("in.safetensors", stage_c(), ABOUT)
    assert merge(*words) == 0
    assert merge("in.safetensors", "plainly.safetensors", "--lora", "plain.safetensors") == 0
    assert Path("out.safetensors").read_bytes() == Path("plainly.safetensors").read_bytes()


def test_another_word_than_a_strength(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", "much")
    assert "usage: cascade merge" in (said := capsys.readouterr().err)
    assert "unrecognized arguments: much" in said


def fp8_file(path: str, scale_name: str, per_row: bool) -> dict[str, torch.Tensor]:
    """Stage C with its matrices in fp8, with one scale each or one a row."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stage_c(torch.bfloat16).items():
        tensors[name] = tensor
        if name.endswith(".weight") and tensor.ndim == 2:
            values = tensor.float()
            scale = (values.abs().amax(1, keepdim=True) if per_row else values.abs().max()) / 448
            tensors[name] = (values / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", scale_name)] = scale
    write_safetensors(path, tensors, ABOUT)
    return tensors


@pytest.mark.parametrize(("scale", "per_row"), [(".weight_scale", False), (".scale_weight", True)])
def test_scaled_fp8_stays_so(scale, per_row, folder):
    """Changed weights get scales anew, in the file's own layout; the others keep their bytes."""
    tensors = fp8_file("in.safetensors", scale, per_row)
    assert merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", "0.7") == 0
    written, _ = read_safetensors("out.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    network = load_model("in.safetensors", expect="stage_c", dtype=torch.float32)[0]
    read, _ = read_weights("out.safetensors", "stage_c")
    with patched(network, [Patch("plain", read_adapter("plain.safetensors").stage_c, 0.7)]):
        for name, expected in network.state_dict().items():
            if name.removesuffix(".weight") in LAYERS:
                error = (read[name].float() - expected).abs().max() / expected.abs().max()
                assert 0 < error < 0.04, name
            else:
                assert torch.equal(read[name].float(), expected), name


def large_matrices() -> set[str]:
    """The weights that our loaders hold in 8 bits, but for those of convolutions."""
    layers = quantisable(StageC(CONFIG))
    return {f"{name}.weight" for name, layer in layers if layer.weight.ndim == 2}


@pytest.mark.parametrize(("option", "stated"), [("--fp8", "float8_e4m3fn"), ("--int8", "int8_tensorwise")])
def test_8_bits_are_written_as_comfyui_reads_them(option, stated, folder):
    """A matrix has one scale in fp8, one a row in int8; what is not large stays."""
    write_safetensors("in.safetensors", fuse_attention(stage_c(torch.bfloat16)), ABOUT)
    assert merge("in.safetensors", "plain16.safetensors", "--lora", "plain.safetensors") == 0
    assert merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", option) == 0
    written, _ = read_safetensors("out.safetensors")
    expected, large = split_attention(read_safetensors("plain16.safetensors")[0]), large_matrices()
    assert len(large) > 10
    for name, tensor in expected.items():
        if name in large:
            layer = name.removesuffix(".weight")
            assert json.loads(bytes(written[f"{layer}.comfy_quant"].tolist())) == {"format": stated}
            scale = written[f"{layer}.weight_scale"]
            assert scale.shape == (() if option == "--fp8" else (len(tensor), 1))
            error = (written[name].float() * scale - tensor.float()).abs().max() / tensor.abs().max()
            assert 0 < error <= 0.04, name
        else:
            assert torch.equal(written[name], tensor), name
    assert len(written) == len(expected) + 2 * len(large)
    assert load_model("out.safetensors", expect="stage_c")[0].config == CONFIG


@pytest.mark.parametrize("layout", ["published", "all-in-one", "diffusers"])
@pytest.mark.parametrize(("option", "dtype"), [("--fp8", E4M3), ("--int8", INT8)])
def test_8_bits_are_read_back(layout, option, dtype, folder):
    """They may have any layout; int8 is to the bit what the LoRA makes at run time, fp8 as near as another rounding
    is.
    """
    ours = stage_c()
    tensors = {
        "published": fuse_attention(ours),
        "all-in-one": {f"model.diffusion_model.{name}": tensor for name, tensor in ours.items()},
        "diffusers": layout_named("stage_c", DIFFUSERS).from_published(ours),
    }[layout]
    write_safetensors("in.safetensors", tensors, ABOUT)
    assert merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", "0.7", option) == 0
    network: Any = load_model("in.safetensors", "stage_c", eight_bit=dtype)[0]
    merged: Any = load_model("out.safetensors", "stage_c", eight_bit=dtype)[0]
    with patched(network, [Patch("plain", read_adapter("plain.safetensors").stage_c, 0.7)]):
        for name, layer in quantised_layers(network):
            other = merged.get_submodule(name)
            if dtype == INT8:
                assert torch.equal(layer.weight, other.weight), name
                assert torch.equal(layer.weight_scale, other.weight_scale), name
            values, others = (each.dequantised(torch.float32) for each in (layer, other))
            assert (values - others).norm() <= 0.05 * values.norm(), name


def test_from_one_8_bit_format_to_another(folder):
    """All that described the former format goes: the scales, and the statement in the header."""
    tensors = fp8_file("in.safetensors", ".weight_scale", per_row=False)
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    header = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    write_safetensors("in.safetensors", tensors, {**ABOUT, "_quantization_metadata": json.dumps(header)},
                      overwrite=True)  # fmt: skip
    assert merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", "0.7", "--int8") == 0
    written, metadata = read_safetensors("out.safetensors")
    large = large_matrices()
    assert {name for name, tensor in written.items() if tensor.dtype == torch.int8} == large
    stated = json.loads(metadata["_quantization_metadata"])["layers"]
    assert stated.keys() == set(layers) - {name.removesuffix(".weight") for name in large}
    before, after = (read_weights(f"{name}.safetensors", "stage_c")[0] for name in ("in", "out"))
    for name in large:
        if name.removesuffix(".weight") not in LAYERS:
            assert (after[name] - before[name]).float().norm() <= 0.02 * before[name].float().norm(), name


def test_one_8_bit_format_at_a_time(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        merge("in.safetensors", "out.safetensors", "--lora", "plain.safetensors", "--fp8", "--int8")
    assert "not allowed with argument --fp8" in capsys.readouterr().err


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """Of the mapped file, 64 MB are changed and written with 40 MB to spare."""
    names = [f"layers.{number}" for number in range(16)]
    tensors = {f"{name}.weight": torch.full((1000, 1000), float(number)) for number, name in enumerate(names)}
    write_safetensors(tmp_path / "in", tensors, {})
    del tensors
    ones = LowRank(torch.ones(1, 1000), torch.ones(1000, 1))
    patches = [Patch("ones", dict.fromkeys(names, ones), 0.5)]

    def write(source: dict[str, torch.Tensor], listed: list[Patch]) -> MergedFile:
        merged = MergedFile()
        assert merged.add_network(source, PUBLISHED, listed) == []
        write_safetensors(tmp_path / "out", merged.tensors, {}, value=merged.value)
        return merged

    write({"a.weight": torch.zeros(2, 2)}, [])  # what is imported once
    with memory_limited_to(168_000_000):  # the reader maps it twice
        assert write(read_safetensors(tmp_path / "in")[0], patches).changed == 16
    written, _ = read_safetensors(tmp_path / "out")
    assert all(bool((written[f"{name}.weight"] == number + 0.5).all()) for number, name in enumerate(names))


REFUSED = [
    (
        ("--lora", "plain.safetensors", "nan"),
        "'nan' is not a strength; give a number such as 0.8 after --lora plain",
    ),
    (("--lora", "plain.safetensors", "1", "1", "1"), "has 3 strengths; give at most two"),
    (("--lora", "plain.safetensors", "0"), "change nothing at these strengths"),
    (("--lora", "none.safetensors"), "none.safetensors does not exist"),
    (("--lora", "in.safetensors"), "but a LoRA is expected"),
    (
        ("--lora", "plain.safetensors", "--text-output", "b.safetensors"),
        "in.safetensors holds no text encoder to write; name one with --text-encoder, or leave --text-output out",
    ),
    (("--lora", "plain.safetensors", "--one-file"), "or leave --one-file out"),
    (
        ("--lora", "plain.safetensors", "--one-file", "--text-output", "b.safetensors"),
        "are two places for the text encoder; give one",
    ),
    (("--lora", "plain.safetensors", "--text-encoder", str(TEXT_ENCODER)), "Say where the text encoder goes"),
    (
        (
            "--lora",
            "plain.safetensors",
            "--text-encoder",
            str(TEXT_ENCODER),
            "--text-output",
            "./out.safetensors",
        ),
        "is to be both files",
    ),
    (
        ("--lora", "plain.safetensors", "--text-encoder", "in.safetensors", "--one-file"),
        "in.safetensors holds no text encoder",
    ),
    (("--lora", "wide.safetensors"), "is a LoRA for another Stage C"),
    (("--lora", "plain.safetensors", "--force"), "The weights do not fit StageC: 1 missing (clf.1.bias)"),
    (("--lora", "sick.safetensors"), "holds NaN or infinity"),
    (
        ("--lora", "plain.safetensors", "--lora", "tokens.safetensors"),
        "tokens.safetensors teaches tokens alone, which no merged file holds; leave it out here and load it beside",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_nothing_is_written_where_something_is_wrong(arguments, message, folder, capsys):
    write_safetensors("in.safetensors", stage_c(), ABOUT)
    wide = LowRank(torch.ones(2, 99), torch.ones(48, 2))
    write_adapter("wide.safetensors", Adapter("wide", "kohya", {"clip_txt_mapper": wide}), "kohya")
    sick = LowRank(torch.full((2, 40), torch.nan), torch.ones(48, 2))
    write_adapter("sick.safetensors", Adapter("sick", "kohya", {"clip_txt_mapper": sick}), "kohya")
    tokens = (LearnedToken("star", torch.ones(1, 64)),)
    write_adapter("tokens.safetensors", Adapter("tokens", "embedding", tokens=tokens), "embedding")
    if "--force" in arguments:  # of a file that is not whole
        write_safetensors("in.safetensors", {n: t for n, t in stage_c().items() if n != "clf.1.bias"}, ABOUT)
    before = sorted(folder.iterdir())
    assert message in failing("in.safetensors", "out.safetensors", *arguments, capsys=capsys)
    assert sorted(folder.iterdir()) == before


def test_a_fused_input_that_is_not_three(folder, capsys):
    fused = fuse_attention(stage_c())
    name = next(name for name in fused if name.endswith("in_proj_bias"))
    write_safetensors("in.safetensors", fused | {name: torch.zeros(7)}, ABOUT)
    assert "do not make three equal parts" in failing(
        "in.safetensors", "out.safetensors", *LORAS, capsys=capsys
    )


def test_what_is_there_is_not_overwritten_unasked(folder, capsys):
    write_safetensors("in.safetensors", stage_c(), ABOUT)
    before = Path("in.safetensors").read_bytes()
    assert "is there already" in failing("in.safetensors", "in.safetensors", *LORAS, capsys=capsys)
    assert "that ends in .safetensors" in failing("in.safetensors", "out", *LORAS, capsys=capsys)
    assert Path("in.safetensors").read_bytes() == before
    assert merge("in.safetensors", "in.safetensors", *LORAS, "--force") == 0
    expected = as_patched(torch.float32)
    read, _ = read_safetensors("in.safetensors")
    assert all(torch.equal(read[name], expected[name]) for name in expected)
