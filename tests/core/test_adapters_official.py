"""The official dialect: which number is which layer, one attention input for three, learned tokens."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import (
    Adapter,
    LearnedToken,
    LowRank,
    parse_adapter,
    read_adapter,
    to_dialect,
    write_adapter,
)
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.adapters.fused import fuse, split
from cascade_nodes.cascade_core.adapters.names import (
    QKV,
    published_layers,
    published_parameter,
    stage_c_shapes,
)
from cascade_nodes.cascade_core.adapters.order import FILTERS, SIZES, kind, parse_filters
from cascade_nodes.tests.core.lora_files import ABOUT, CONFIG, change, everything, golden
from cascade_nodes.tests.golden_weights import manifest_shapes, relative_error

MANIFESTS = {"3.6 B": "stage_c_3.6b", "1 B": "stage_c_1b"}


class Numbered(nn.Module):
    """Stands where the published trainer puts its LoRA modules."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, weight):
        return weight


def published_modules(parameters) -> nn.Module:
    """Modules of the published names, in the published state dict's order; weights of one element."""
    root = nn.Module()
    for name in parameters:
        *path, leaf = name.split(".")
        module = root
        for part in path[: path.index("attn") if "attn" in path else len(path)]:
            module._modules.setdefault(part, nn.Module())
            module = module.get_submodule(part)
        if "attn" in path:
            module._modules.setdefault("attn", nn.MultiheadAttention(1, 1))
        elif leaf == "weight":
            module.register_parameter(leaf, nn.Parameter(torch.zeros(1, 1)))
    return root


def numbered(root: nn.Module, filters) -> list[str]:
    """The parameters in the order in which the published trainer's `modules()` meets what it put on them."""
    for name, module in root.named_modules():
        if filters is None or any(part in name for part in filters):
            for leaf in ("weight", "in_proj_weight"):
                if isinstance(getattr(module, leaf, None), nn.Parameter):
                    parametrize.register_parametrization(module, leaf, Numbered(f"{name}.{leaf}"))
                    break
    return [module.name for module in root.modules() if isinstance(module, Numbered)]


@pytest.mark.parametrize("size", list(MANIFESTS))
@pytest.mark.parametrize("filters", [(".attn",), None, ("kv_mapper", ".mapper"), ("channelwise",)])
def test_the_order_is_torchs_own(size, filters):
    layers = [layer for layer in published_layers(SIZES[size]) if filters is None or kind(layer) in filters]
    expected = numbered(published_modules(manifest_shapes(MANIFESTS[size])), filters)
    assert [published_parameter(layer) for layer in layers] == expected


def test_the_golden_order():
    layers = [layer for layer in published_layers(CONFIG) if kind(layer) == ".attn"]
    assert [published_parameter(layer) for layer in layers] == ABOUT["order"]


@pytest.mark.parametrize("size", list(MANIFESTS))
def test_layers_have_the_published_shapes(size):
    shapes = manifest_shapes(MANIFESTS[size])
    for layer, shape in published_layers(SIZES[size]).items():
        assert shapes[published_parameter(layer)] == shape


def official_file(config, filters, rank=1) -> dict[str, torch.Tensor]:
    """An official LoRA of all layers of some kinds, without values."""
    tensors = {}
    layers = [shape for layer, shape in published_layers(config).items() if kind(layer) in filters]
    for i, (rows, columns, *_) in enumerate(layers):
        tensors[f"weights.{i}.lora_down"] = torch.empty(rank, columns, device="meta")
        tensors[f"weights.{i}.lora_up"] = torch.empty(rows, rank, device="meta")
    return tensors


def test_the_published_files_names_and_shapes():
    shapes = manifest_shapes("lora_official_rank4_attn_3.6b")
    made = official_file(SIZES["3.6 B"], [".attn"], rank=4)
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == shapes


@pytest.mark.parametrize("size", list(MANIFESTS))
@pytest.mark.parametrize(
    "filters",
    [
        (".attn",),
        FILTERS,
        (".attn", "kv_mapper"),
        (".attn", "channelwise"),
        ("depthwise", ".mapper"),
        ("clf",),
    ],
)
def test_size_and_layers_are_found_by_the_shapes(size, filters):
    adapter = parse_adapter(official_file(SIZES[size], filters), {}, "a.safetensors")
    of_kind = {
        layer for layer in stage_c_shapes(SIZES[size]) if kind(layer.replace("to_", "in_proj_")) in filters
    }
    assert set(adapter.stage_c) == of_kind
    assert all(adapter.stage_c[layer].fits(stage_c_shapes(SIZES[size])[layer]) for layer in of_kind)


FOUND = [
    "attn", "attention", "attn.out_proj,kv_mapper", "attn,kv_mapper", "channelwise.0", "channelwise.4", "channelwise",
    "wise", ".mapper", "mapper_", "clip_txt", "clip_txt_mapper", "clip_txt_pooled", "clip_img", "clip", "embedding",
    "clf", "scalers", "blocks", "blocks.0", "down_blocks.0", "up_blocks.1", "up_blocks,.attn", ".attn,clip_txt,clf",
    "attn,channelwise.0,embedding", "null",
]  # fmt: skip
AMBIGUOUS = {
    "attn.out_proj": "out_proj or kv_mapper",
    "kv_mapper": "out_proj or kv_mapper",
    "mapper": "out_proj, .mapper, clip_txt_mapper, clip_txt_pooled, clip_img or kv_mapper, .mapper",
    "mapper_sca": "mapper_sca or mapper_crp",
    "downscalers": "downscalers or upscalers",
    "down_blocks": "down_blocks.0, down_blocks.1 or down_blocks.0, up_blocks.0",
    "up_blocks.0": "down_blocks.1 or up_blocks.0",
}
UNKNOWN = ["down_blocks.0.2", "down_blocks.0.5.attention", "1.channelwise"]


def trained_with(size, filters) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A file of the published trainer with these module_filters, without values, and its layers' published names."""
    parameters = numbered(published_modules(manifest_shapes(MANIFESTS[size])), filters)
    shapes = {published_parameter(layer): shape for layer, shape in published_layers(SIZES[size]).items()}
    tensors = {}
    for i, parameter in enumerate(parameters):
        rows, columns, *_ = shapes[parameter]
        tensors[f"weights.{i}.lora_down"] = torch.empty(1, columns, device="meta")
        tensors[f"weights.{i}.lora_up"] = torch.empty(rows, 1, device="meta")
    return tensors, parameters


def changed_parameters(adapter) -> set[str]:
    names = set()
    for layer in adapter.stage_c:
        block, _, part = layer.rpartition("attn.")
        names.add(f"{block}attn.in_proj_weight" if f"attn.{part}" in QKV else f"{layer}.weight")
    return names


@pytest.mark.parametrize("size", list(MANIFESTS))
@pytest.mark.parametrize("text", [*FOUND, *AMBIGUOUS, *UNKNOWN])
def test_every_list_of_module_filters_is_read_or_refused(size, text):
    filters = parse_filters(text)
    tensors, parameters = trained_with(size, filters)
    given = parse_adapter(tensors, {}, "a", filters=filters)
    assert changed_parameters(given) == set(parameters)
    stated = parse_adapter(tensors, {"module_filters": json.dumps(filters)}, "a")
    assert list(stated.stage_c) == list(given.stage_c)
    if text in FOUND:
        assert list(parse_adapter(tensors, {}, "a").stage_c) == list(given.stage_c)
        return
    reason = (
        f"which could be those of {AMBIGUOUS[text]}"
        if text in AMBIGUOUS
        else "which are none of the published"
    )
    with pytest.raises(
        CascadeError, match=rf"{re.escape(reason)}.*; give the .*module_filters .*\(--filters in"
    ):
        parse_adapter(tensors, {}, "a")


def test_module_filters_that_are_not_the_files():
    tensors, _ = trained_with("1 B", ["attn"])
    with pytest.raises(CascadeError, match=r"of 64 numbered layers .*, which are not those that the module_filters "
                       r"\['clf'\] find in a published Stage C; give those"):  # fmt: skip
        parse_adapter(tensors, {}, "a", filters=["clf"])


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("", None), (" , ", None), ("[]", None), ("null", ("",)), (".attn", (".attn",)),
        ("['.attn', \"clf\"]", (".attn", "clf")), (".attn,clf", (".attn", "clf")),
    ],
)  # fmt: skip
def test_module_filters_as_the_trainers_settings_have_them(text, filters):
    assert parse_filters(text) == filters


def test_the_golden_lora_needs_its_stage_c_or_its_order():
    with pytest.raises(CascadeError, match=r"golden is an official LoRA of 12 numbered layers \(the first 64 × 64\), "
                       r"which are none of the published Stage Cs' \(3.6 B, 1 B\); give the Stage C"):  # fmt: skip
        parse_adapter(golden("official"), {}, "golden")
    stated = parse_adapter(golden("official"), {"order": json.dumps(ABOUT["order"])}, "golden")
    found = parse_adapter(golden("official"), {}, "golden", CONFIG)
    assert list(stated.stage_c) == list(found.stage_c)


@pytest.mark.parametrize(
    "order", ["[", "[]", '["a"]', "5", "[5]", json.dumps([*ABOUT["order"][:-1], "a.weight"])]
)
def test_a_stated_order_that_is_none(order):
    with pytest.raises(
        CascadeError, match=r"golden: the order in its metadata is not a JSON list of the 12 layers"
    ):
        parse_adapter(golden("official"), {"order": order}, "golden")


def test_a_lora_of_another_size_is_refused_by_name():
    file = official_file(SIZES["3.6 B"], [".attn"])
    with pytest.raises(CascadeError, match=r"a is an official LoRA of 128 numbered layers \(the first 2048 × 2048\), "
                       r"which are not this Stage C's \(1536, 1536 wide\); it is for the 3.6 B one\."):  # fmt: skip
        parse_adapter(file, {}, "a", SIZES["1 B"])
    del file["weights.127.lora_down"], file["weights.127.lora_up"]
    with pytest.raises(
        CascadeError, match=r"of 127 numbered layers .* wide\); choose the one that it was made for"
    ):
        parse_adapter(file, {}, "a", SIZES["3.6 B"])


@pytest.mark.parametrize("key", ["weights.3.lora_up", "weights.5.lora_down", "embeddings.indices"])
def test_a_file_that_is_not_whole(key):
    file = golden("official")
    del file[key]
    with pytest.raises(CascadeError, match=rf"{key.rpartition('.')[0]}.*belong.*download it again"):
        parse_adapter(file, {}, "a", CONFIG)


def test_the_attention_input_is_split_by_rows_and_fused_again_with_one_down():
    whole = change((12, 5), alpha=2.0)
    parts = low_rank_changes(split(whole, "attn.in_proj"))
    assert all(part.down is whole.down for part in parts.values())
    assert torch.equal(torch.cat([parts[name].delta() for name in QKV]), whole.delta())
    again = fuse(parts, 4)
    assert again.down is whole.down
    assert torch.equal(again.up, whole.up)
    assert again.alpha == whole.alpha


def test_separate_downs_are_fused_exactly_at_the_sum_of_their_ranks():
    parts = {
        name: change((4, 5), rank, alpha)
        for name, rank, alpha in zip(QKV, (1, 2, 3), (1.0, 3.0, None), strict=True)
    }
    whole = fuse(parts, 4)
    assert whole.rank == 6
    assert relative_error(whole.delta(), torch.cat([parts[name].delta() for name in QKV])) <= 1e-6
    lone = fuse({"attn.to_k": parts["attn.to_k"]}, 4)
    assert relative_error(lone.delta()[4:8], parts["attn.to_k"].delta()) <= 1e-6
    assert not lone.delta()[:4].any()
    assert not lone.delta()[8:].any()


def test_what_cannot_be_split():
    for whole, reason in (
        (change((10, 5)), "10 rows"),
        (change((12, 5), dora="column"), "one magnitude for q, k and v"),
    ):
        with pytest.raises(CascadeError, match=rf"a.attn.in_proj has {reason}.*cannot be split"):
            split(whole, "a.attn.in_proj")


def test_official_files_come_back_bit_for_bit(tmp_path):
    file = golden("official")
    write_adapter(tmp_path / "a.safetensors", parse_adapter(file, {}, "a", CONFIG), "official", CONFIG)
    adapter = read_adapter(tmp_path / "a.safetensors")
    again, _ = to_dialect(adapter, "official", CONFIG)
    assert again.keys() == file.keys()
    assert all(torch.equal(again[key], file[key]) for key in file)


def test_through_kohya_and_back_the_attention_input_is_one_again():
    file = golden("official")
    kohya, _ = to_dialect(replace(parse_adapter(file, {}, "a", CONFIG), tokens=()), "kohya")
    again, _ = to_dialect(parse_adapter(kohya, {}, "a"), "official", CONFIG)
    assert all(torch.equal(again[key], file[key]) for key in file if key.startswith("weights."))


def test_layers_left_alone_are_zeros_and_all_have_one_rank():
    layers = {"down_blocks.0.2.attention.attn.to_v": change((64, 64), rank=2, alpha=1.0),
              "up_blocks.1.2.attention.attn.out_proj": change((64, 64), rank=5, alpha=3.0)}  # fmt: skip
    tensors, metadata = to_dialect(Adapter("a", "kohya", layers), "official", CONFIG)
    assert json.loads(metadata["order"]) == ABOUT["order"]
    assert (json.loads(metadata["module_filters"]), metadata["rank"]) == ([".attn"], "5")
    assert all(len(tensors[f"weights.{i}.lora_down"]) == 5 for i in range(12))
    read = low_rank_changes(parse_adapter(tensors, {}, "a", CONFIG).stage_c)
    for layer, low_rank in read.items():
        if layer in layers:
            assert relative_error(low_rank.delta(), layers[layer].delta()) <= 1e-6
        else:
            assert not low_rank.delta().any()


def test_a_depthwise_change_is_the_same_at_every_position():
    """The published trainer applies it so."""
    down, up = torch.randn(2, 1), torch.randn(64, 2)
    file = {
        f"weights.{i}.lora_{part}": tensor for i in range(6) for part, tensor in (("down", down), ("up", up))
    }
    depthwise = [layer for layer in published_layers(CONFIG) if kind(layer) == "depthwise"]
    assert len(depthwise) == 6
    adapter = parse_adapter(file, {}, "a", CONFIG)
    assert list(adapter.stage_c) == depthwise
    expected = (up @ down / 2).view(64, 1, 1, 1).expand(64, 1, 3, 3)
    assert torch.allclose(low_rank_changes(adapter.stage_c)[depthwise[0]].delta(), expected)
    again, _ = to_dialect(adapter, "official", CONFIG)
    assert all(torch.equal(again[key], file[key]) for key in file)
    other = replace(adapter, stage_c={depthwise[0]: change((64, 1, 3, 3))})
    with pytest.raises(
        CascadeError, match=r"depthwise has a change of its own for each position of its kernel"
    ):
        to_dialect(other, "official", CONFIG)


def test_tokens_of_the_vocabulary_and_new_ones():
    file = golden("official")
    tokens = parse_adapter(file, {}, "a", CONFIG).tokens
    assert [(token.name, token.index) for token in tokens] == [("", 3), ("", 17)]
    assert torch.equal(torch.cat([token.vectors for token in tokens]), file["embeddings.embeddings"])
    new = LearnedToken("[star]", torch.ones(1, 12))
    tensors, metadata = to_dialect(
        Adapter("a", "omi", tokens=(new, *tokens)), "official", CONFIG, vocabulary=20
    )
    assert tensors["embeddings.indices"].tolist() == [20, 3, 17]
    assert metadata["train_tokens"] == '[["[star]", null]]'
    read = parse_adapter(tensors, metadata, "a").tokens
    assert [(token.name, token.index) for token in read] == [("[star]", None), ("", 3), ("", 17)]
    unnamed = parse_adapter(tensors, {}, "a").tokens
    assert [(token.name, token.index) for token in unnamed] == [("", 20), ("", 3), ("", 17)]


def test_new_tokens_that_began_as_others_keep_their_setting(tmp_path):
    """Their first row is not in the file, so they stay changes of a row."""
    stated = '[["[fernando]", "^dog</w>"], ["^snail", null]]'
    file = {"embeddings.embeddings": torch.ones(2, 12), "embeddings.indices": torch.tensor([20, 7])}
    adapter = parse_adapter(file, {"train_tokens": stated}, "a")
    assert [(token.name, token.index) for token in adapter.tokens] == [("", 20), ("", 7)]
    adapter = replace(adapter, tokens=(*adapter.tokens, LearnedToken("<ring>", torch.ones(1, 12))))
    write_adapter(
        tmp_path / "a.safetensors", adapter, "official", CONFIG, 20, {"train_tokens": stated, "by": "me"}
    )
    read = read_adapter(tmp_path / "a.safetensors")
    assert [(token.name, token.index) for token in read.tokens] == [("", 20), ("", 7), ("<ring>", None)]


def test_without_tokens_the_published_loader_finds_none():
    tensors, _ = to_dialect(replace(everything(), tokens=(), text={}, stage_c={}), "official", CONFIG)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "embeddings.embeddings": (0, CONFIG.c_clip_text),
        "embeddings.indices": (0,),
    }
    assert parse_adapter(tensors, {}, "a").tokens == ()


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Adapter("a", "kohya", text={"text_projection": change((4, 4))}), "1 layers of the text encoder"),
        (Adapter("a", "kohya", {"clf.1": change((16, 64, 1, 1), dora="row")}), "1 DoRA magnitudes of rows"),
        (
            Adapter("a", "kohya", {"clf.1": change((16, 64, 1, 1), dora="column")}),
            "1 DoRA magnitudes of columns",
        ),
        (
            Adapter("a", "kohya", tokens=(LearnedToken("[x]", torch.ones(2, 4)),)),
            "1 tokens with several rows",
        ),
        (
            Adapter("a", "kohya", tokens=(LearnedToken("x", torch.ones(1, 4)),)),
            "1 tokens whose names are in no brackets",
        ),
    ],
)
def test_what_an_official_file_cannot_hold(adapter, reason):
    with pytest.raises(CascadeError, match=rf"a holds {reason}.*the dialect official has no keys for; choose one that "
                       r"can \(.*onetrainer.*\)"):  # fmt: skip
        to_dialect(adapter, "official", CONFIG)


def test_layers_are_numbered_only_for_a_stage_c_that_has_them():
    low_rank = LowRank(torch.ones(1, 2048), torch.ones(2048, 1))
    adapter = Adapter("a", "kohya", {"up_blocks.0.71.attention.attn.to_q": low_rank})
    tensors, _ = to_dialect(adapter, "official")
    assert len(tensors) == 2 * 128 + 2
    with pytest.raises(
        CascadeError, match=r"a is a LoRA for another Stage C: of the 1 layers that it changes 1 do not"
    ):
        to_dialect(adapter, "official", SIZES["1 B"])
    strange = replace(adapter, stage_c={"up_blocks.0.71.attention.attn.to_q": change((64, 64))})
    with pytest.raises(CascadeError, match=r"none of the published sizes \(3.6 B, 1 B\).*give the Stage C"):
        to_dialect(strange, "official")
