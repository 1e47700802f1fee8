"""Folders and files as other programs write them, with the values that those programs get from them."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    DIFFUSERS,
    fuse_attention,
    layout_named,
    load_model,
    networks_in,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from cascade_nodes.cascade_core.checkpoints.quantised import as_float, fp8_layout, rescaled, split_quantised
from cascade_nodes.cascade_core.model_files import ModelFiles
from cascade_nodes.cascade_core.text.encoder import TextEncoder, encode_tokens
from cascade_nodes.cascade_core.vision import ImageEncoder
from cascade_nodes.nodes.hosts import host
from cascade_nodes.nodes.loaders import CascadeCheckpointLoader
from cascade_nodes.tests.core.test_layouts import tiny

ARCHIVE = Path(__file__).parents[1] / "data" / "other_programs.tar.xz"
FOLDERS = {
    "combined": {"stage_c", "stage_b", "stage_a", "text", "vision"},
    "combined_bf16": {"stage_c", "stage_b", "stage_a", "text", "vision"},
    "prior": {"stage_c", "text", "vision"},
    "decoder": {"stage_b", "stage_a", "text"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of what other programs wrote."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def answers(written):
    return load_file(written / "answers.safetensors")


def wave(*shape: int) -> torch.Tensor:
    return ((torch.arange(torch.Size(shape).numel()) * 5) % 23 / 11.5 - 1).view(shape)


def answer(kind: str, path: Path) -> torch.Tensor:
    """What a network of a file says to the wave that the other program's was asked."""
    network: Any = load_model(path, expect=kind, dtype=torch.float32)[0]
    r = torch.tensor([0.4])
    with torch.inference_mode():
        if kind == "stage_c":
            return network(wave(1, 16, 6, 6), r, wave(1, 5, 16), wave(1, 1, 16), wave(1, 1, 16))
        if kind == "stage_b":
            return network(wave(1, 4, 8, 8), r, wave(1, 16, 2, 2), wave(1, 1, 16))
        return network.decode(wave(1, 4, 4, 4))


def close(value: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return value.shape == reference.shape and bool(
        (value - reference).abs().max() <= tolerance * reference.abs().max()
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_diffusers(name, written, answers):
    """Each network is found in its place, with the configuration beside it, and computes what diffusers' does."""
    folder = written / name
    assert networks_in(folder) == FOLDERS[name]
    for kind in FOLDERS[name] & {"stage_c", "stage_b", "stage_a"}:
        assert close(answer(kind, folder), answers[kind]), kind
    text = TextEncoder.load(folder, dtype=torch.float32)
    tokens = torch.tensor([[52, *text.tokenizer.tokens("a b"), *[53] * 74]])
    assert tokens[0, :4].tolist() == [52, 26, 27, 53]
    tokens = torch.tensor([[52, 26, 1, 27, *[53] * 73]])
    states, pooled = encode_tokens(text.model, tokens, 53)
    assert close(states, answers["text"])
    assert close(pooled, answers["pooled"])
    if "vision" in FOLDERS[name]:
        image = ImageEncoder.load(folder, dtype=torch.float32)
        assert close(image.encode_pixels(wave(1, 3, 8, 8)), answers["vision"])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_diffusers_is_a_folder_of_models(name, written):
    files = ModelFiles(written / name)
    roles = {
        "stage_c": "stage_c",
        "stage_b": "stage_b",
        "stage_a": "stage_a",
        "text": "text_encoder",
        "vision": "vision",
    }
    for part, role in roles.items():
        assert files.find_optional(role) == (written / name if part in FOLDERS[name] else None)


def test_one_network_of_a_folder_in_shards(written, answers):
    """The index with its variant, any shard, and the folder stand for the network."""
    prior = written / "combined_bf16" / "prior_prior"
    index = prior / "diffusion_pytorch_model.safetensors.index.bf16.json"
    shards = sorted(prior.glob("*.safetensors"))
    assert len(shards) > 1
    for path in (prior, index, *shards):
        assert close(answer("stage_c", path), answers["stage_c"]), path.name


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.bf16.json",
        "diffusion_pytorch_model.bf16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.bf16.index.json",
    ],
)
def test_variants_beside_the_full_precision(index, written, answers, tmp_path):
    """Shards of a variant are taken where there is nothing else, and never in place of the full precision."""
    shutil.copytree(written / "combined_bf16" / "prior_prior", tmp_path / "prior")
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors.index.bf16.json").rename(
        tmp_path / "prior" / index
    )
    assert close(answer("stage_c", tmp_path), answers["stage_c"])
    read, _ = read_weights(tmp_path, "stage_c")
    assert read["clip_txt_mapper.weight"].dtype == torch.bfloat16
    whole = written / "prior" / "prior" / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, tmp_path / "prior" / whole.name)
    read, _ = read_weights(tmp_path, "stage_c")
    assert read["clip_txt_mapper.weight"].dtype == torch.float32


def test_the_full_precision_in_shards_before_a_whole_variant(tmp_path):
    stage_c = layout_named("stage_c", DIFFUSERS).from_published(tiny("stage_c"))
    folder, shard = tmp_path / "prior", "diffusion_pytorch_model-00001-of-00001.safetensors"
    write_safetensors(folder / shard, stage_c, {})
    halves = {name: tensor.bfloat16() for name, tensor in stage_c.items()}
    write_safetensors(folder / "diffusion_pytorch_model.bf16.safetensors", halves, {})
    index = json.dumps({"weight_map": dict.fromkeys(stage_c, shard)})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    assert read_weights(tmp_path, "stage_c")[0]["clip_txt_mapper.weight"].dtype == torch.float32


PREFIXES = ("module.", "_orig_mod.", "generator.", "diffusion_model.", "prior.", "module._orig_mod.",
            "_orig_mod.module.", "model.", "module.generator._fsdp_wrapped_module.")  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "layout"),
    [
        *((prefix, "published") for prefix in (*PREFIXES, "model.diffusion_model.")),
        ("prior.", "diffusers"),
        ("_orig_mod.", "diffusers"),
        ("", "diffusers in an all-in-one"),
        ("module.", "diffusers in an all-in-one"),
    ],
)
def test_prefixes_of_trainers(prefix, layout, tmp_path):
    """Also a trainer's counters beside the network are not part of it."""
    expected = tiny("stage_c")
    names = layout_named("stage_c", layout).from_published(expected)
    tensors = {prefix + name: tensor for name, tensor in names.items()}
    tensors |= {"step": torch.tensor(7), "global_step": torch.tensor([7]), "ema.decay": torch.tensor(0.9)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert networks_in(tmp_path / "x.safetensors") == {"stage_c"}
    found = load_model(tmp_path / "x.safetensors", expect="stage_c")[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_wrapped_modules_within_names(tmp_path):
    expected = tiny("stage_b")
    tensors = {
        name.replace("down_blocks.0.0.", "down_blocks.0.0._orig_mod."): t for name, t in expected.items()
    }
    assert tensors.keys() != expected.keys()
    save_file(tensors, tmp_path / "x.safetensors")
    assert load_model(tmp_path / "x.safetensors", expect="stage_b")[0].state_dict().keys() == expected.keys()


def test_two_networks_under_two_prefixes(tmp_path):
    tensors = {f"prior.{name}": tensor for name, tensor in tiny("stage_c").items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in tiny("stage_b").items()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert networks_in(path) == {"stage_c", "stage_b"}
    for kind in ("stage_c", "stage_b"):
        assert load_model(path, expect=kind)[0].state_dict().keys() == tiny(kind).keys()


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("generator.", "holds stage_c twice, under (module|generator). and"),
        ("module._orig_mod.", "stands twice"),
    ],
)
def test_a_network_twice_in_a_file(prefix, message, tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in tiny("stage_c").items()}
    tensors |= {prefix + name: tensor.clone() for name, tensor in tiny("stage_c").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CascadeError, match=message):
        load_model(tmp_path / "x.safetensors", expect="stage_c")


@pytest.mark.parametrize(
    "config",
    [
        "lr: 1e-4\nmodel_version: 3.6B",
        '{"lr": 1e-4, "dropout": 0.1, "batch_size": 4}',
        '["a"]',
        "{}",
        "[" * 99_999,
    ],
)
def test_a_config_of_another_program_in_the_header(config, tmp_path):
    for kind in ("stage_c", "stage_b", "stage_a", "previewer"):
        (tmp_path / "x.safetensors").write_bytes(save(tiny(kind), {"config": config}))
        assert load_model(tmp_path / "x.safetensors")[0].state_dict().keys() == tiny(kind).keys()


def test_config_of_diffusers_in_the_header(written, answers, tmp_path):
    prior = written / "prior" / "prior"
    tensors, _ = read_safetensors(prior / "diffusion_pytorch_model.safetensors")
    (tmp_path / "x.safetensors").write_bytes(save(tensors, {"config": (prior / "config.json").read_text()}))
    assert close(answer("stage_c", tmp_path / "x.safetensors"), answers["stage_c"])


def test_fp8_of_comfyui(written, tmp_path):
    """Its weights are the stored values times their scales; what it computes is what ComfyUI computes."""
    path = written / "comfyui_fp8.safetensors"
    tensors, _ = read_safetensors(path)
    read, _ = read_weights(path, "stage_c")
    scaled = 0
    for name, tensor in read.items():
        stored, scale = (
            tensors[f"model.diffusion_model.{name}"],
            tensors.get(f"model.diffusion_model.{name}_scale"),
        )
        scaled += scale is not None
        expected = stored if scale is None else (stored.float() * scale).bfloat16()
        assert torch.equal(tensor, expected), name
    assert scaled > 10
    assert any(name.endswith(".input_scale") for name in tensors)
    theirs = load_file(written / "comfyui_fp8_answer.safetensors")["stage_c"]
    assert close(answer("stage_c", path), theirs, 1e-2)  # the products of values and scales are in bf16
    published = layout_named("stage_c", ALL_IN_ONE).to_published(tensors)
    exact = {
        name: rescaled("x", name, published[name], published.get(f"{name}_scale", torch.tensor(1.0)))
        for name in read
    }
    (tmp_path / "x.safetensors").write_bytes(save(exact))
    assert close(answer("stage_c", tmp_path / "x.safetensors"), theirs)


def test_fp8_as_the_header_states_it(written, tmp_path):
    """The other form of ComfyUI's layout: all formats in the header, no comfy_quant."""
    tensors, _ = read_safetensors(written / "comfyui_fp8.safetensors")
    layers = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
    text = json.dumps(
        {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    (tmp_path / "x.safetensors").write_bytes(save(tensors, {"_quantization_metadata": text}))
    read, _ = read_weights(tmp_path / "x.safetensors", "stage_c")
    expected, _ = read_weights(written / "comfyui_fp8.safetensors", "stage_c")
    assert all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_written_as_comfyui_does(dtype, written):
    """What is quantised anew has ComfyUI's values and scales; a weight of zeros has the scale 1."""
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(5))
    parts = fp8_layout("a.weight", weight, dtype)
    assert parts["a.weight"].dtype == dtype
    assert json.loads(bytes(parts["a.comfy_quant"].tolist())) == {"format": str(dtype).removeprefix("torch.")}
    assert parts["a.weight_scale"] == weight.abs().max() / torch.finfo(dtype).max
    assert close(
        as_float(split_quantised("x", parts)[1]["a.weight"]).float(),
        weight,
        0.08 if dtype == torch.float8_e4m3fn else 0.15,
    )
    assert fp8_layout("a.weight", torch.zeros(2, 2))["a.weight_scale"] == 1
    tensors, _ = read_safetensors(written / "comfyui_fp8.safetensors")
    name = "model.diffusion_model.up_blocks.0.2.attention.attn.to_q.weight"
    again = fp8_layout(name, tensors[name].float() * tensors[f"{name}_scale"])
    assert torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8))
    assert torch.allclose(again[f"{name}_scale"], tensors[f"{name}_scale"])


def conf(**values) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


BYTES = torch.zeros(8, 1, dtype=torch.uint8)
LAYER = "clip_txt_mapper"
OTHERS = {
    "nf4 of bitsandbytes": {f"{LAYER}.weight": BYTES, f"{LAYER}.weight.quant_state.bitsandbytes__nf4": BYTES},
    "fp4 of bitsandbytes": {f"{LAYER}.weight": BYTES, f"{LAYER}.weight.quant_state.bitsandbytes__fp4": BYTES},
    "int8 of bitsandbytes": {f"{LAYER}.weight": BYTES.to(torch.int8), f"{LAYER}.SCB": torch.ones(8)},
    "quanto's quantised weights": {
        f"{LAYER}.weight._data": BYTES.to(torch.int8),
        f"{LAYER}.weight._scale": BYTES,
    },
    "GPTQ's or AWQ's quantised weights": {f"{LAYER}.qweight": torch.zeros(8, 1, dtype=torch.int32)},
    "nvfp4": {
        f"{LAYER}.weight": BYTES,
        f"{LAYER}.weight_scale": BYTES,
        f"{LAYER}.weight_scale_2": torch.ones(()),
    },
    "ComfyUI's int8_tensorwise with convrot": {
        f"{LAYER}.weight": BYTES.to(torch.int8),
        f"{LAYER}.weight_scale": torch.ones(8, 1),
        f"{LAYER}.comfy_quant": conf(format="int8_tensorwise", convrot=True, convrot_groupsize=256),
    },
    "ComfyUI's mxfp8": {f"{LAYER}.weight_scale": BYTES, f"{LAYER}.comfy_quant": conf(format="mxfp8")},
    "8-bit whole numbers without scales": {
        f"{LAYER}.weight": BYTES.to(torch.int8),
        f"{LAYER}.scale": torch.ones(8),
    },
}


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("scheme", OTHERS)
def test_other_quantisations_are_named(scheme, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(tiny("stage_c") | copies(OTHERS[scheme])))
    with pytest.raises(
        CascadeError, match=f"^x.safetensors holds {scheme}, which is not read; choose the network in"
    ):
        load_model(tmp_path / "x.safetensors", expect="stage_c")


@pytest.mark.parametrize("text", ["5", "{", '{"layers": 5}', '{"layers": {"a": 5}}', "[" * 9999])
def test_a_quantisation_that_is_not_stated_well(text, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(tiny("stage_c"), {"_quantization_metadata": text}))
    with pytest.raises(
        CascadeError, match="_quantization_metadata is not JSON with layers and their formats"
    ):
        load_model(tmp_path / "x.safetensors", expect="stage_c")
    tensors = tiny("stage_c") | {f"{LAYER}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CascadeError, match=r"clip_txt_mapper.comfy_quant does not state a format as JSON"):
        load_model(tmp_path / "x.safetensors", expect="stage_c")


def test_a_format_that_is_not_bytes(tmp_path):
    save_file(tiny("stage_c") | {f"{LAYER}.comfy_quant": torch.full((3,), 1e9)}, tmp_path / "x.safetensors")
    with pytest.raises(CascadeError, match="does not state a format as JSON"):
        load_model(tmp_path / "x.safetensors", expect="stage_c")


ULTRAPIXEL = {
    "module.64.0.wtokens": torch.zeros(4, 4),
    "module.64.0.wtoken_postfc.wb0.0.weight": torch.zeros(4),
    "module.64.0.hr_norm.mapping.mapper.weight": torch.zeros(4, 4),
}


@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_networks_beside_stable_cascade_are_named(kind, written, tmp_path):
    for name, what in (("prior", "Würstchen v2 prior"), ("decoder", "Würstchen v2 decoder")):
        with pytest.raises(
            CascadeError, match=f"^wuerstchen_{name}.safetensors is a {what}, but Stage . is expected"
        ):
            load_model(written / f"wuerstchen_{name}.safetensors", expect=kind)
    save_file(ULTRAPIXEL, tmp_path / "x.safetensors")
    with pytest.raises(
        CascadeError, match=r"^x.safetensors is a network that UltraPixel adds to Stage C, but Stage ."
    ):
        load_model(tmp_path / "x.safetensors", expect=kind)
    save_file({"<cat-toy>": torch.zeros(768)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CascadeError, match=r"^x.safetensors is a textual inversion embedding, but Stage . is expected"
    ):
        load_model(tmp_path / "x.safetensors", expect=kind)


@pytest.mark.parametrize("name", ["combined", "combined_bf16"])
def test_the_checkpoint_loader_on_a_combined_pipeline(name, written):
    """MODEL is Stage C, not Stage B, and CLIP_VISION is there."""
    outputs: Any = CascadeCheckpointLoader.execute(str(written / name), "auto").result
    model, clip, vae, vision = outputs
    assert host().describe_network(model).kind == "stage_c"
    assert clip is not None
    assert vae is not None
    assert vision is not None


def test_what_is_no_lora_is_named(written, tmp_path):
    """A textual inversion as diffusers saves it, and what lies beside Stable Cascade."""
    save_file({"<cat-toy>": torch.zeros(768)}, tmp_path / "toy.safetensors")
    message = (
        "^toy.safetensors is a textual inversion embedding, but a LoRA .* write embedding:toy into the prompt"
    )
    with pytest.raises(CascadeError, match=message):
        read_adapter(tmp_path / "toy.safetensors")
    save_file(ULTRAPIXEL, tmp_path / "x.safetensors")
    with pytest.raises(
        CascadeError, match="a network that UltraPixel adds to Stage C, but a LoRA is expected"
    ):
        read_adapter(tmp_path / "x.safetensors")
    with pytest.raises(CascadeError, match="the weights of a Würstchen v2 prior, but a LoRA is expected"):
        read_adapter(written / "wuerstchen_prior.safetensors")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_a_stage_c_with_ultrapixel_inside_is_named(prefix, tmp_path):
    weights = fuse_attention(tiny("stage_c"))
    extra = {
        "agg_net.0.to_ff.weight": torch.zeros(2, 2),
        "norm_down_blocks.0.1.mapper.weight": torch.zeros(2, 2),
    }
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {prefix + name: tensor for name, tensor in {**weights, **extra}.items()}, {})
    with pytest.raises(
        CascadeError, match=r"a\.safetensors: The weights hold the network that UltraPixel adds to Sta"
    ):
        load_model(path, "stage_c")
