"""Other programs' names for the published networks: recognised, converted both ways, read only where asked for."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import (
    CascadeError,
    Previewer,
    SemanticCompressor,
    StageA,
    StageB,
    StageC,
    infer_config,
)
from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    DIFFUSERS,
    LAYOUTS,
    layout_named,
    load_model,
    networks_in,
    parts_in,
    read_weights,
    split_attention,
    write_safetensors,
)
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.vision import ImageEncoder
from cascade_nodes.tests.core.test_activations import STAGE_B, STAGE_C, STAGES

MANIFESTS = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "golden" / "checkpoint_manifests.json.gz").read_bytes())
)
WEIGHTS = Path(__file__).parents[2] / "demo" / "weights"
TINY = {
    "stage_c": (StageC, STAGE_C),
    "stage_b": (StageB, STAGE_B),
    "stage_a": (StageA, {"levels": 2, "bottleneck_blocks": 1, "c_hidden": 16, "codebook_size": 16}),
    "compressor": (SemanticCompressor, {"stem": 24, "stages": STAGES, "c_last": 64}),
    "previewer": (Previewer, {"c_hidden": 16}),
}
NAMED = [(part, layout) for part, layouts in LAYOUTS.items() for layout in layouts]
IDS = [f"{part}, {layout.name}, {index}" for index, (part, layout) in enumerate(NAMED)]
# What diffusers, ComfyUI and the text encoder's authors publish, by part and layout.
PUBLISHED = {
    "stage_c": ("stage_c_3.6b", "stage_c_1b"),
    "stage_b": ("stage_b_1.5b", "stage_b_700m"),
    "stage_a": ("stage_a",),
    "compressor": ("effnet_encoder",),
    "previewer": ("previewer",),
    "controlnet": (
        "controlnet_canny",
        "controlnet_inpainting",
        "controlnet_super_resolution",
        "controlnet_identity",
    ),
    "text": ("text_encoder_clip_bigg",),
    "vision": ("image_encoder_clip_vit_l14",),
}
DIFFUSERS_FILES = {
    "diffusers_prior": ("stage_c", "stage_c_3.6b"),
    "diffusers_prior_lite": ("stage_c", "stage_c_1b"),
    "diffusers_decoder": ("stage_b", "stage_b_1.5b"),
    "diffusers_decoder_lite": ("stage_b", "stage_b_700m"),
    "diffusers_vqgan": ("stage_a", "stage_a"),
}


def on_meta(name):
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (dtype, shape) in MANIFESTS[name].items()
    }


def tiny(part):
    torch.manual_seed(0)
    kind, config = TINY[part]
    return {name: tensor.clone() for name, tensor in kind.from_config(config).state_dict().items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("part", "layout"), [(p, one) for p, one in NAMED if p in TINY], ids=lambda x: str(x)[:20]
)
def test_there_and_back_bit_for_bit(part, layout):
    published = tiny(part)
    theirs = layout.from_published(published)
    assert parts_in(theirs)[part].name == layout.name
    equal(parts_in(theirs)[part].to_published(theirs), published)


@pytest.mark.parametrize(("part", "layout"), NAMED, ids=IDS)
def test_full_size_by_manifest(part, layout):
    for manifest in PUBLISHED[part]:
        published = split_attention(on_meta(manifest))
        theirs = layout.from_published(published)
        if layout.name != "published":
            assert theirs.keys() != published.keys()
        found = parts_in(theirs)
        assert part in found
        back = found[part].to_published(theirs)
        assert shapes(back) == shapes(published)
        if part not in ("text", "vision"):
            assert infer_config(back) == infer_config(on_meta(manifest))


@pytest.mark.parametrize("manifest", DIFFUSERS_FILES)
def test_what_diffusers_publishes(manifest):
    part, published = DIFFUSERS_FILES[manifest]
    found = parts_in(on_meta(manifest))
    assert {name: layout.name for name, layout in found.items()} == {part: "diffusers"}
    back = found[part].to_published(on_meta(manifest))
    assert shapes(back) == shapes(split_attention(on_meta(published)))


def test_an_all_in_one_of_stage_c(tmp_path):
    networks = {part: tiny(part) for part in ("stage_c", "compressor", "previewer")}
    tensors = {
        name: tensor
        for part, published in networks.items()
        for name, tensor in layout_named(part, ALL_IN_ONE).from_published(published).items()
    }
    tensors |= {"vae.encoder.mean": torch.zeros(3), "vae.encoder.std": torch.ones(3)}
    text = {"text_encoder.clip_g.logit_scale": torch.zeros(())}
    path = tmp_path / "any name.safetensors"
    write_safetensors(path, tensors | text, {"config": '{"c_in": 99}'})
    assert networks_in(path) == set(networks)
    for part, published in networks.items():
        equal(split_attention(load_model(path, expect=part)[0].state_dict()), split_attention(published))
    with pytest.raises(
        CascadeError, match=r"any name.safetensors holds .*Stage C.*, but Stage B is expected here"
    ):
        load_model(path, expect="stage_b")


@pytest.mark.parametrize("layout", LAYOUTS["text"], ids=range(len(LAYOUTS["text"])))
def test_text_encoders(layout, tmp_path):
    published, metadata = read_weights(WEIGHTS / "demo_text_encoder", "text")
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        if (WEIGHTS / "demo_text_encoder" / file).exists():
            (tmp_path / file).write_bytes((WEIGHTS / "demo_text_encoder" / file).read_bytes())
    write_safetensors(tmp_path / "model.safetensors", layout.from_published(published), metadata)
    expected = TextEncoder.load(WEIGHTS / "demo_text_encoder").model
    equal(TextEncoder.load(tmp_path).model.state_dict(), expected.state_dict())


def test_image_encoder_of_an_all_in_one(tmp_path):
    published, metadata = read_weights(WEIGHTS / "demo_image_encoder.safetensors", "vision")
    path = tmp_path / "x.safetensors"
    write_safetensors(path, layout_named("vision", ALL_IN_ONE).from_published(published), metadata)
    image = torch.rand(1, 96, 96, 3)
    expected = ImageEncoder.load(WEIGHTS / "demo_image_encoder.safetensors").encode(image)
    assert torch.equal(ImageEncoder.load(path).encode(image), expected)


def diffusers_folder(root, shards=0):
    """prior/ with Stage C, in one file or in shards, and vqgan/ with Stage A."""
    stage_c = layout_named("stage_c", DIFFUSERS).from_published(tiny("stage_c"))
    if shards:
        names = sorted(stage_c)
        files = {f"x-{n:05}-of-{shards:05}.safetensors": names[n::shards] for n in range(shards)}
        for file, own in files.items():
            write_safetensors(root / "prior" / file, {name: stage_c[name] for name in own}, {})
        places = {name: file for file, own in files.items() for name in own}
        index = json.dumps({"metadata": {}, "weight_map": places})
        (root / "prior" / "x.safetensors.index.json").write_text(index, encoding="utf-8")
    else:
        write_safetensors(root / "prior" / "diffusion_pytorch_model.safetensors", stage_c, {})
        halves = {name: tensor.bfloat16() for name, tensor in stage_c.items()}
        write_safetensors(root / "prior" / "diffusion_pytorch_model.bf16.safetensors", halves, {})
    stage_a = layout_named("stage_a", DIFFUSERS).from_published(tiny("stage_a"))
    write_safetensors(root / "vqgan" / "diffusion_pytorch_model.safetensors", stage_a, {})


@pytest.mark.parametrize("shards", [0, 3])
def test_diffusers_folders(shards, tmp_path):
    diffusers_folder(tmp_path, shards)
    assert networks_in(tmp_path) == {"stage_c", "stage_a"}
    for path in (tmp_path, tmp_path / "prior"):
        equal(load_model(path, expect="stage_c")[0].state_dict(), split_attention(tiny("stage_c")))
    equal(load_model(tmp_path, expect="stage_a")[0].state_dict(), tiny("stage_a"))


def test_a_shard_stands_for_all(tmp_path):
    diffusers_folder(tmp_path, 3)
    shard = tmp_path / "prior" / "x-00001-of-00003.safetensors"
    equal(load_model(shard, expect="stage_c")[0].state_dict(), split_attention(tiny("stage_c")))


def rewrite(index, change):
    content = json.loads(index.read_text(encoding="utf-8"))
    change(content["weight_map"])
    index.write_text(json.dumps(content), encoding="utf-8")


def pipe_in_place_of(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "x-00001-of-00003.safetensors").unlink(),
            "names x-00001.*, which is missing: 3 ",
        ),
        (
            lambda folder: rewrite(
                folder / "x.safetensors.index.json", lambda places: places.update(a="../x.safetensors")
            ),
            "names the shard '../x.safetensors', which is not beside it",
        ),
        (
            lambda folder: rewrite(
                folder / "x.safetensors.index.json",
                lambda places: places.update(nothing="x-00001-of-00003.safetensors"),
            ),
            "lacks nothing, which x.safetensors.index.json says it holds",
        ),
        (
            lambda folder: (folder / "x.safetensors.index.json").write_text("{", encoding="utf-8"),
            "is not JSON with a table",
        ),
        (
            lambda folder: (folder / "x.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
            "is not the index of a sharded checkpoint",
        ),
        (
            lambda folder: rewrite(
                folder / "x.safetensors.index.json",
                lambda places: places.update({f"a{i}": f"{i}.safetensors" for i in range(2000)}),
            ),
            "names 2003 shards, but 1000 at most are read",
        ),
        (
            lambda folder: rewrite(
                folder / "x.safetensors.index.json", lambda places: places.update(a="\x1b[2J.safetensors")
            ),
            r"names the shard '.x1b\[2J.safetensors', which is not beside it",
        ),
        (
            lambda folder: os.truncate(folder / "x.safetensors.index.json", 10**9),
            "has more than the 25000000 bytes that are read",
        ),
        (
            lambda folder: pipe_in_place_of(folder / "x.safetensors.index.json"),
            "cannot be read|x-0000",
        ),
        (
            lambda folder: pipe_in_place_of(folder / "x-00002-of-00003.safetensors"),
            "names x-00002-of-00003.safetensors, which is missing",
        ),
    ],
)
def test_damaged_shards(damage, message, tmp_path):
    diffusers_folder(tmp_path, 3)
    damage(tmp_path / "prior")
    with pytest.raises(CascadeError, match=message):
        load_model(tmp_path / "prior", expect="stage_c")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_precisions(dtype, tmp_path):
    cast = {name: tensor.to(dtype) for name, tensor in tiny("stage_c").items()}
    write_safetensors(tmp_path / "x.safetensors", cast, {})
    as_stored, _, _ = load_model(tmp_path / "x.safetensors", expect="stage_c")
    assert {tensor.dtype for tensor in as_stored.state_dict().values()} == {dtype}
    found = load_model(tmp_path / "x.safetensors", expect="stage_c", dtype=torch.float32)[0].state_dict()
    equal(found, {name: tensor.float() for name, tensor in cast.items()})


def test_scaled_fp8(tmp_path):
    published = tiny("stage_c")
    name = "clf.1.weight"
    stored = published | {
        name: (published[name] / 0.5).to(torch.float8_e4m3fn),
        "clf.1.scale_weight": torch.tensor(0.5),
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    write_safetensors(tmp_path / "x.safetensors", stored, {})
    found = load_model(tmp_path / "x.safetensors", expect="stage_c", dtype=torch.float32)[0].state_dict()
    assert torch.allclose(found[name], published[name], rtol=0.07, atol=1e-3)


SDXL = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        (SDXL, (640, 2048), "Stable Diffusion XL checkpoint"),
        (SDXL, (320, 768), "Stable Diffusion 1.5 checkpoint"),
        (SDXL, (320, 1024), "Stable Diffusion 2 checkpoint"),
        (SDXL.removeprefix("model.diffusion_model."), (320, 768), "Stable Diffusion 1.5 checkpoint"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            (640, 2048),
            "Stable Diffusion XL",
        ),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", (1, 1), "Stable Diffusion 3 model"),
        ("double_blocks.0.img_attn.qkv.weight", (1, 1), "Flux model"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (1, 1), "Flux model"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (1, 1), "T5 text encoder"),
        ("decoder.conv_in.weight", (1, 1, 3, 3), "Stable Diffusion VAE"),
        ("lora_unet_down_blocks_0_0_x.lora_down.weight", (4, 8), "LoRA"),
        ("weights.0.lora_up", (8, 4), "LoRA"),
    ],
)
def test_files_of_other_models_are_named(name, shape, what, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {name: torch.zeros(shape)}, {})
    with pytest.raises(
        CascadeError, match=f"x.safetensors is a {what}.* but Stage C is expected here; choose a Stage C"
    ):
        load_model(tmp_path / "x.safetensors", expect="stage_c")


def test_mixed_layouts_are_refused(tmp_path):
    mixed = tiny("stage_c")
    name = next(key for key in mixed if key.endswith("attn.to_q.weight"))
    mixed[f"{name}.extra"] = mixed.pop(name)
    write_safetensors(tmp_path / "x.safetensors", mixed, {})
    with pytest.raises(CascadeError, match=r"1 missing \(.*to_q.weight.*1 unexpected"):
        load_model(tmp_path / "x.safetensors", expect="stage_c")
