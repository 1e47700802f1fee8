"""Every dialect reads as the same LoRA, and is written and read back unchanged."""

import json
import re
from dataclasses import replace

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError, StageC, load_published_state_dict
from cascade_nodes.cascade_core.adapters import (
    DIALECTS,
    Adapter,
    LearnedToken,
    LowRank,
    check_fits,
    describe_adapter,
    parse_adapter,
    read_adapter,
    to_dialect,
    write_adapter,
)
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.adapters.names import stage_c_layer, stage_c_shapes, text_layer
from cascade_nodes.cascade_core.adapters.order import SIZES
from cascade_nodes.cascade_core.adapters.read import _locate
from cascade_nodes.cascade_core.adapters.write import obstacles
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.tests.core.lora_files import (
    CONFIG,
    GOLDEN,
    STAGE_C,
    TEXT_SHAPES,
    change,
    everything,
    golden,
)
from cascade_nodes.tests.golden_weights import manifest_shapes, relative_error

NAMED = [name for name, dialect in DIALECTS.items() if dialect.kind == "named"]
FOR_STAGE_C = ["official", *NAMED]


def stage_c_output(adapter: Adapter) -> torch.Tensor:
    """Stage C's prediction for its golden inputs with the adapter fused into its golden weights."""
    weights = {key.removeprefix("weights."): w for key, w in STAGE_C.items() if key.startswith("weights.")}
    model = load_published_state_dict(StageC(CONFIG), weights).eval().requires_grad_(False)
    check_fits(adapter, model)
    for layer, low_rank in low_rank_changes(adapter.stage_c).items():
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        weight += low_rank.delta(weight.shape)
    with torch.no_grad():
        return model(
            *(STAGE_C[f"in.{name}"] for name in ("x", "r", "clip_text", "clip_text_pooled", "clip_img"))
        )


@pytest.mark.parametrize("dialect", ["official", "kohya", "onetrainer", "diffusers"])
def test_the_golden_files_give_the_published_output(dialect):
    adapter = parse_adapter(golden(dialect), {}, "golden.safetensors", CONFIG)
    assert (adapter.dialect, len(adapter.stage_c), adapter.unknown) == (dialect, 24, ())
    assert relative_error(stage_c_output(adapter), GOLDEN["out.official"]) <= 1e-5


@pytest.mark.parametrize("dialect", FOR_STAGE_C)
def test_the_golden_lora_gives_it_in_every_dialect(dialect, tmp_path):
    adapter = parse_adapter(golden("kohya"), {}, "golden.safetensors")
    write_adapter(tmp_path / "lora.safetensors", adapter, dialect, CONFIG, vocabulary=20)
    read = read_adapter(tmp_path / "lora.safetensors")
    assert (read.name, read.dialect) == ("lora.safetensors", dialect)
    assert relative_error(stage_c_output(read), GOLDEN["out.official"]) <= 1e-5


def kept(adapter: Adapter, dialect: str) -> Adapter:
    """What of an adapter a dialect can hold."""
    spoken = DIALECTS[dialect]

    def allowed(low_rank: LowRank) -> LowRank:
        if low_rank.magnitude is None:
            return low_rank
        ending = spoken.column_magnitude if len(low_rank.magnitude) == 1 else spoken.row_magnitude
        return low_rank if ending else replace(low_rank, magnitude=None)

    numbered = spoken.kind == "numbered"
    return replace(
        adapter,
        stage_c={layer: allowed(c) for layer, c in low_rank_changes(adapter.stage_c).items()
                 if not (numbered and layer.endswith("depthwise"))},
        text={layer: allowed(c) for layer, c in low_rank_changes(adapter.text).items()
              if spoken.text is not None},
        tokens=() if spoken.tokens is None else adapter.tokens[:1] if numbered else adapter.tokens,
    )  # fmt: skip


def assert_same(read: LowRank, written: LowRank, exact: bool, shape: tuple[int, ...]):
    if exact:
        assert torch.equal(read.down, written.down)
        assert torch.equal(read.up, written.up)
        assert read.alpha == written.alpha
    assert relative_error(read.delta(shape), written.delta(shape)) <= 1e-6
    if read.magnitude is None or written.magnitude is None:
        assert read.magnitude is written.magnitude
    else:
        assert torch.equal(read.magnitude, written.magnitude)


@pytest.mark.parametrize("dialect", FOR_STAGE_C)
def test_all_that_a_dialect_can_hold_comes_back(dialect, tmp_path):
    adapter = kept(everything(), dialect)
    assert obstacles(adapter, dialect) == []
    write_adapter(tmp_path / "all.safetensors", adapter, dialect, CONFIG, vocabulary=20)
    read = read_adapter(tmp_path / "all.safetensors", CONFIG)
    assert (read.dialect, read.unknown) == (dialect, ())
    assert {*read.stage_c} == {*adapter.stage_c}
    assert {*read.text} == {*adapter.text}
    exact = DIALECTS[dialect].alpha is not None
    shapes = stage_c_shapes(CONFIG) | TEXT_SHAPES
    for part in ("stage_c", "text"):
        for layer, written in getattr(adapter, part).items():
            assert_same(getattr(read, part)[layer], written, exact, shapes[layer])
    assert sorted((t.name, t.index, t.output, t.vectors.tolist()) for t in read.tokens) == sorted(
        (t.name, t.index, t.output, t.vectors.tolist()) for t in adapter.tokens
    )


@pytest.mark.parametrize("dialect", FOR_STAGE_C)
def test_a_file_written_again_has_the_same_tensors(dialect):
    adapter = kept(everything(), dialect)
    tensors, metadata = to_dialect(adapter, dialect, CONFIG, vocabulary=20)
    again, _ = to_dialect(parse_adapter(tensors, metadata, "a", CONFIG), dialect, CONFIG, vocabulary=20)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("dialect", NAMED)
def test_a_dialect_finds_its_own_names_of_every_layer(dialect):
    spoken = DIALECTS[dialect]
    for config in (CONFIG, *SIZES.values()):
        for layer in stage_c_shapes(config):
            assert _locate(spoken.stage_c_name(layer)) == ("stage_c", layer)
    for layer in TEXT_SHAPES if spoken.text is not None else ():
        assert _locate(spoken.text_name(layer)) == ("text", layer)


def test_pefts_file_of_a_text_encoder():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    read = parse_adapter(file_of(f"base_model.model.{layer}", change((12, 12)), *ENDINGS[1]), {}, "a")
    assert (list(read.text), read.stage_c, read.unknown) == ([layer], {}, ())


def test_diffusers_own_names_are_found():
    layers = [
        key.removesuffix(".weight") for key in manifest_shapes("diffusers_prior") if key.endswith(".weight")
    ]
    assert {stage_c_layer(layer) for layer in layers} == set(stage_c_shapes(SIZES["3.6 B"]))


def test_the_text_encoders_own_names_are_found():
    names = [
        key.removesuffix(".weight")
        for key in manifest_shapes("text_encoder_clip_bigg")
        if key.endswith(".weight")
    ]
    assert len(names) == 32 * 8 + 4
    assert all(text_layer(name) == text_layer(name.replace(".", "_")) == name for name in names)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_unet_down_blocks_0_2_attention_attn_to_out", "down_blocks.0.2.attention.attn.out_proj"),
        ("lora_prior_unet_up_blocks_1_23_attention_to_out_0", "up_blocks.1.23.attention.attn.out_proj"),
        ("lora_prior_unet_up_blocks_1_2_attention_attn_to_out_proj", "up_blocks.1.2.attention.attn.out_proj"),
        ("lora_prior_prior_down_blocks_0_2_attention_to_k", "down_blocks.0.2.attention.attn.to_k"),
        ("unet.down_blocks.0.2.attention.attn.in_proj.1", "down_blocks.0.2.attention.attn.to_k"),
        ("base_model.model.prior.down_blocks.0.2.attention.to_v", "down_blocks.0.2.attention.attn.to_v"),
        ("down_blocks.0.2.attention.to_v", "down_blocks.0.2.attention.attn.to_v"),
        ("model.diffusion_model.clf.1", "clf.1"),
        ("lora_unet_down_blocks_0_1_mapper_sca", "down_blocks.0.1.mapper_sca"),
        ("lora_unet_up_upscalers_0_1_blocks_1", "up_upscalers.0.1.blocks.1"),
        ("text_encoders.clip_g.text_projection", "text_projection"),
    ],
)
def test_names_of_programs_that_are_no_dialect_of_their_own(theirs, ours):
    located = _locate(theirs)
    assert located is not None
    assert located[1] == ours


def file_of(layer: str, low_rank: LowRank, down: str, up: str) -> dict[str, torch.Tensor]:
    return {f"{layer}{down}": low_rank.down, f"{layer}{up}": low_rank.up}


ENDINGS = [
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A", ".lora_B"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
]


@pytest.mark.parametrize(("down", "up"), ENDINGS)
def test_all_endings_that_comfyui_reads(down, up):
    written = change((8, 6))
    for prefix, dialect in (("diffusion_model.", "comfyui"), ("lora_unet_", "kohya")):
        separator = DIALECTS[dialect].separator
        layer = "down_blocks.0.2.attention.attn.to_q".replace(".", separator)
        read = parse_adapter(file_of(prefix + layer, written, down, up), {}, "a.safetensors")
        assert read.dialect == dialect or down.startswith(".lora_A")
        assert_same(
            low_rank_changes(read.stage_c)["down_blocks.0.2.attention.attn.to_q"], written, True, (8, 6)
        )


def test_a_fused_attention_input_under_its_own_name():
    whole, layer = change((24, 8), alpha=2.0, dora="row"), "up_blocks.0.2.attention.attn.in_proj"
    file = file_of("lora_unet_" + layer.replace(".", "_"), whole, *ENDINGS[0])
    adapter = parse_adapter(file, {}, "a")
    assert list(adapter.stage_c) == [layer.replace("in_proj", part) for part in ("to_q", "to_k", "to_v")]
    deltas = torch.cat([low_rank.delta() for low_rank in low_rank_changes(adapter.stage_c).values()])
    assert torch.equal(deltas, replace(whole, alpha=None).delta())


def test_without_an_alpha_the_scale_is_one():
    low_rank = change((8, 6), rank=4)
    layer = "lora_unet_clip_txt_mapper"
    file = file_of(layer, low_rank, *ENDINGS[0])
    read = low_rank_changes(parse_adapter(file, {}, "a").stage_c)["clip_txt_mapper"]
    assert read.scale == 1
    tensors, _ = to_dialect(Adapter("a", "kohya", {"clip_txt_mapper": low_rank}), "kohya")
    assert tensors[f"{layer}.alpha"].item() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_where_that_is_exact(dtype):
    low_rank = change((8, 6), rank=4, alpha=2.0)
    low_rank = replace(low_rank, down=low_rank.down.to(dtype), up=low_rank.up.to(dtype))
    adapter = Adapter("a", "kohya", {"clip_txt_mapper": low_rank})
    tensors, _ = to_dialect(adapter, "peft")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    read = low_rank_changes(parse_adapter(tensors, {}, "a").stage_c)["clip_txt_mapper"]
    assert torch.equal(read.delta(), low_rank.delta())
    third = replace(low_rank, alpha=1 / 3)
    tensors, _ = to_dialect(replace(adapter, stage_c={"clip_txt_mapper": third}), "peft")
    assert tensors["base_model.model.clip_txt_mapper.lora_B.weight"].dtype == torch.float32
    read = low_rank_changes(parse_adapter(tensors, {}, "a").stage_c)["clip_txt_mapper"]
    assert relative_error(read.delta(), third.delta()) <= 1e-6


def test_magnitudes_stand_where_each_program_reads_them():
    layers = {"clip_txt_mapper": (8, 6), "clf.1": (4, 6, 1, 1)}
    for axis, endings in (("row", (".lora_magnitude_vector.weight",) * 2), ("column", (".dora_scale",) * 2)):
        adapter = Adapter("a", "kohya", {layer: change(shape, dora=axis) for layer, shape in layers.items()})
        kohya, _ = to_dialect(adapter, "kohya")
        diffusers, _ = to_dialect(adapter, "diffusers")
        kohya_shapes = [
            tuple(kohya[f"lora_unet_{name}.dora_scale"].shape) for name in ("clip_txt_mapper", "clf_1")
        ]
        shapes = [
            tuple(diffusers[f"prior.{layer}{end}"].shape) for layer, end in zip(layers, endings, strict=True)
        ]
        if axis == "row":
            assert kohya_shapes == [(8, 1), (4, 1, 1, 1)]
            assert shapes == [(8,), (1, 4, 1, 1)]
            peft, _ = to_dialect(adapter, "peft")
            assert peft["base_model.model.clip_txt_mapper.lora_magnitude_vector"].shape == (8,)
        else:
            assert kohya_shapes == shapes == [(1, 6), (1, 6, 1, 1)]


def test_square_convolutions_magnitudes_are_told_apart_by_their_ending():
    """(1, c, 1, 1) is by row under PEFT's name and by column under kohya's."""
    low_rank, layer = change((6, 6, 1, 1)), "up_upscalers.0.1.blocks.1"
    ending = {"row": ".lora_magnitude_vector.weight", "column": ".dora_scale"}
    for axis, shape in (("row", (6, 1)), ("column", (1, 6))):
        tensors = file_of(f"prior.{layer}", low_rank, *ENDINGS[1])
        tensors[f"prior.{layer}{ending[axis]}"] = torch.rand(1, 6, 1, 1)
        magnitude = low_rank_changes(parse_adapter(tensors, {}, "a").stage_c)[layer].magnitude
        assert magnitude is not None
        assert magnitude.shape == shape


def test_matrices_for_convolutions_take_their_form():
    """ComfyUI's trainer writes such matrices: (rank, c_in · k²)."""
    tensors = {}
    for layer, rows, columns in (("clf.1", 4, 6), ("down_blocks.0.0.depthwise", 6, 9)):
        tensors |= file_of(f"diffusion_model.{layer}", change((rows, columns)), *ENDINGS[0])
    read = low_rank_changes(parse_adapter(tensors, {}, "a").stage_c)
    assert read["clf.1"].delta().shape == (4, 6, 1, 1)
    assert read["down_blocks.0.0.depthwise"].delta().shape == (6, 1, 3, 3)


def test_onetrainers_depthwise_form():
    """down (rank, C, k, k), up (1, rank, 1, 1): the product is taken as (C, 1, k, k)."""
    down, up = torch.randn(2, 6, 3, 3), torch.randn(1, 2, 1, 1)
    tensors = file_of("lora_prior_unet_down_blocks_0_0_depthwise", LowRank(down, up), *ENDINGS[0])
    tensors["lora_prior_unet_down_blocks_0_0_depthwise.dora_scale"] = torch.rand(6, 1, 1, 1)
    low_rank = low_rank_changes(parse_adapter(tensors, {}, "a").stage_c)["down_blocks.0.0.depthwise"]
    assert low_rank.fits((6, 1, 3, 3))
    assert not low_rank.fits((7, 1, 3, 3))
    expected = (up[0, 0] * down[0] + up[0, 1] * down[1]).unsqueeze(1)
    assert torch.allclose(low_rank.delta((6, 1, 3, 3)), expected, atol=1e-6)
    assert low_rank.magnitude is not None
    assert low_rank.magnitude.shape == (6, 1)


def test_a_peft_folder_states_its_scale(tmp_path):
    low_rank = change((8, 6), rank=4)
    layers = {"clip_txt_mapper": low_rank, "clf.1": change((4, 6, 1, 1), 4)}
    tensors, _ = to_dialect(Adapter("a", "peft", layers), "peft")
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors, {})
    config = tmp_path / "adapter_config.json"
    config.write_text('{"r": 4, "lora_alpha": 8, "alpha_pattern": {"clf.1": 2}}')
    read = low_rank_changes(read_adapter(tmp_path / "adapter_model.safetensors").stage_c)
    assert [read[layer].scale for layer in ("clip_txt_mapper", "clf.1")] == [2, 0.5]
    config.write_text('{"r": 4, "lora_alpha": 8, "use_rslora": true}')
    read = low_rank_changes(read_adapter(tmp_path / "adapter_model.safetensors").stage_c)
    assert read["clf.1"].scale == 4
    config.write_text("[]")
    with pytest.raises(CascadeError, match=r"adapter_config.json is not JSON with a table"):
        read_adapter(tmp_path / "adapter_model.safetensors")


PEFT_CONFIG = '{"r": 4, "lora_alpha": 8}'


def peft_file(path, metadata=None):
    """A PEFT file of two layers under any name; in the end PEFT's own alpha is not in it."""
    layers = {"clip_txt_mapper": change((8, 6), rank=4), "clf.1": change((4, 6, 1, 1), 4)}
    tensors, _ = to_dialect(Adapter("a", "peft", layers), "peft")
    write_safetensors(path, tensors, metadata or {})
    return path


def scales(adapter):
    return {change.scale for change in adapter.stage_c.values()}


def test_a_renamed_peft_file_says_what_was_assumed_of_its_alpha(tmp_path):
    path = peft_file(tmp_path / "style.safetensors")
    adapter = read_adapter(path)
    assert (scales(adapter), adapter.notes) == ({1}, (
        "style.safetensors states no alpha, and each layer's rank is taken for it; if its training had another "
        "(lora_alpha in PEFT's adapter_config.json), give that as alpha.",
    ))  # fmt: skip
    given = read_adapter(path, alpha=8)
    assert (scales(given), given.notes) == ({2}, ())
    (tmp_path / "adapter_config.json").write_text(PEFT_CONFIG)
    beside = read_adapter(path)
    note = "style.safetensors takes its alpha from adapter_config.json beside it."
    assert (scales(beside), beside.notes) == ({2}, (note,))
    assert scales(read_adapter(path, alpha=2)) == {0.5}
    peft_file(tmp_path / "other.safetensors")  # whose configuration is it?
    assert scales(read_adapter(path)) == {1}
    assert "states no alpha" in read_adapter(path).notes[0]


def test_diffusers_writes_the_configuration_into_the_file(tmp_path):
    adapter = read_adapter(peft_file(tmp_path / "a.safetensors", {"lora_adapter_metadata": PEFT_CONFIG}))
    assert (scales(adapter), adapter.notes) == ({2}, ())
    for text in ("[", "[]", "5", '{"unet.r": 4}', "[" * 99_999):
        path = peft_file(tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        assert "states no alpha" in read_adapter(path).notes[0]


@pytest.mark.parametrize("stated", ["prior", "unet", "base_model.model"])
@pytest.mark.parametrize("named", ["prior", "unet", "base_model.model", "base_model.model.prior", ""])
def test_the_one_network_that_is_stated_may_be_named_otherwise_in_its_layers(stated, named, tmp_path):
    pair = {"lora_A.weight": torch.ones(4, 64), "lora_B.weight": torch.ones(64, 4)}
    stage_c, text = "down_blocks.0.2.attention.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
    layers = [f"{named}.{stage_c}".removeprefix("."), f"text_encoder.{text}"]
    tensors = {f"{layer}.{part}": tensor.clone() for layer in layers for part, tensor in pair.items()}
    metadata = {"lora_adapter_metadata": json.dumps({f"{stated}.r": 4, f"{stated}.lora_alpha": 16})}
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert scales(adapter) == {4}
    of_text = {change.scale for change in low_rank_changes(adapter.text).values()}
    assert of_text == {1}  # of which nothing is stated
    assert "states no alpha" in adapter.notes[0]


def test_files_whose_program_multiplies_alpha_in_say_nothing(tmp_path):
    low_rank = {"down_blocks.0.2.attention.attn.to_q": change((64, 64))}
    for dialect in ("diffusers", "kohya", "official"):
        write_adapter(tmp_path / "a.safetensors", Adapter("a", "kohya", low_rank), dialect, CONFIG)
        assert read_adapter(tmp_path / "a.safetensors").notes == ()


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"init_lora_weights": "pissa"}, "a LoRA with init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "a LoRA with init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "a LoRA with init_lora_weights 'olora'"),
        ({"init_lora_weights": ["x" * 999]}, "a LoRA with init_lora_weights ['xxx"),
        ({"kasa_config": {"beta": 1}}, "a KaSA adapter"),
    ],
)
def test_pefts_that_change_the_networks_own_weights_are_refused(stated, said, tmp_path):
    path = peft_file(tmp_path / "adapter_model.safetensors")
    path.with_name("adapter_config.json").write_text(json.dumps({"lora_alpha": 8, **stated}))
    with pytest.raises(CascadeError, match=rf"adapter_config.json states {re.escape(said)}.*for which PEFT changes the "
                       r"network's own weights .* path_initial_model_for_weight_conversion"):  # fmt: skip
        read_adapter(path, alpha=8)
    for plain in (True, False, "gaussian", "eva", "orthogonal"):
        text = json.dumps({"lora_alpha": 8, "init_lora_weights": plain})
        path.with_name("adapter_config.json").write_text(text)
        assert scales(read_adapter(path)) == {2}


def test_embeddings_in_files_of_their_own(tmp_path):
    vectors = torch.randn(2, 12)
    token = (LearnedToken("star", vectors), LearnedToken("star", vectors, output=True))
    write_adapter(tmp_path / "star.safetensors", Adapter("a", "omi", tokens=token), "embedding")
    adapter = read_adapter(tmp_path / "star.safetensors")
    assert (adapter.dialect, adapter.unknown) == ("embedding", ())
    assert [(t.name, t.index, t.output) for t in adapter.tokens] == [
        ("star", None, False),
        ("star", None, True),
    ]
    assert all(torch.equal(t.vectors, vectors) for t in adapter.tokens)
    other = parse_adapter({"emb_params": vectors, "extra": vectors}, {}, "ring.safetensors")
    assert (other.tokens[0].name, other.unknown) == ("ring", ("extra",))


def test_an_adapter_in_words():
    adapter = everything()
    changes = low_rank_changes({**adapter.stage_c, **adapter.text}).values()
    decomposed = sum(change.magnitude is not None for change in changes)
    assert describe_adapter(adapter) == (
        f"all.safetensors (kohya): {len(adapter.stage_c)} layers of Stage C, 7 layers of the text encoder, "
        f"rank 1 to 4, DoRA magnitudes of {decomposed}, 2 learned tokens ([fernando], <a.style>)"
    )
