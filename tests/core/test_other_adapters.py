"""Adapters of other programs, of every algorithm: the weights that those make of them, or a refusal by name."""

import random
from contextlib import suppress

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import (
    DIALECTS,
    Adapter,
    check_fits,
    describe_adapter,
    parse_adapter,
    to_dialect,
)
from cascade_nodes.cascade_core.adapters.algorithms import ENDINGS, WHOLE
from cascade_nodes.cascade_core.adapters.apply import changed_weight
from cascade_nodes.cascade_core.adapters.changes import Change, Kronecker, LowRank
from cascade_nodes.cascade_core.adapters.compatibility import check_finite_changes
from cascade_nodes.cascade_core.adapters.peft import StatedAlpha
from cascade_nodes.cascade_core.adapters.write import obstacles
from cascade_nodes.tests.core.lora_files import CONFIG
from cascade_nodes.tests.core.other_adapters import before, cases, configuration, read, refused
from cascade_nodes.tests.golden_weights import relative_error

CASES = cases()
QUERY = "down_blocks.0.2.attention.attn.to_q"
ONLY_PEFT = ("PEFT boft", "PEFT oft", "PEFT lora its", "PEFT lora biases", "PEFT lora and", "PEFT ia3")


def changes_of(adapter: Adapter) -> dict[str, Change]:
    return {**adapter.stage_c, **adapter.text}


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_other_programs(name, tmp_path):
    adapter = read(name, tmp_path)
    changes, changed = changes_of(adapter), CASES[name].changed
    assert (adapter.unknown, adapter.notes) == ((), ())
    assert changes.keys() == changed.keys()
    for target, expected in changed.items():
        weight, change = before(target, tuple(expected.shape)), changes[target]
        assert change.fits(expected.shape)
        larger = [size + 1 for size in expected.shape]
        # One block serves as many columns as there are.
        assert name == "PEFT oft shared" or not change.fits(larger)
        full = changed_weight(weight, change, 1.0)
        assert full.dtype == torch.float32
        assert relative_error(full, expected) <= 1e-5
        half = weight + 0.5 * (expected - weight)
        assert relative_error(changed_weight(weight, change, 0.5), half) <= 1e-5
        assert torch.equal(weight, before(target, tuple(expected.shape)))  # nothing is changed in place


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
@pytest.mark.parametrize("name", CASES)
def test_converted_they_make_the_same_weights(name, dialect, tmp_path):
    adapter = read(name, tmp_path)
    unable = name.startswith(ONLY_PEFT) or (dialect == "comfyui" and " ia3" in name)
    assert bool(obstacles(adapter, dialect)) == unable
    if unable:
        with pytest.raises(CascadeError, match=r"holds \d+ changes by .* which the dialect"):
            to_dialect(adapter, dialect)
        return
    again = parse_adapter(to_dialect(adapter, dialect)[0], {}, "again")
    assert (again.dialect, again.unknown) == (dialect, ())
    for target, expected in CASES[name].changed.items():
        weight = before(target, tuple(expected.shape))
        assert relative_error(changed_weight(weight, changes_of(again)[target], 1.0), expected) <= 1e-5


def test_dialects_without_keys_for_an_algorithm():
    adapter = parse_adapter(CASES["LyCORIS loha"].file, {}, "a")
    able = [name for name in DIALECTS if not obstacles(adapter, name)]
    assert able == ["kohya", "kohya_to_out", "comfyui"]
    with pytest.raises(
        CascadeError, match=r"a holds 5 changes by LoHa, .*choose one that can \(kohya, kohya_to_out"
    ):
        to_dialect(adapter, "official")


def test_an_adapter_in_words(tmp_path):
    assert describe_adapter(read("ComfyUI trainer LoKr", tmp_path)) == (
        "ComfyUI trainer LoKr.safetensors (comfyui): 5 layers of Stage C, LoKr, full differences"
    )
    assert "layers of the text encoder" in describe_adapter(read("LyCORIS norms", tmp_path))


@pytest.mark.parametrize(("algorithm", "shapes"), refused())
def test_what_is_not_read_is_refused_by_its_name(algorithm, shapes):
    file = {key: torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(CascadeError, match=rf"style is an adapter of another kind, {algorithm} \([^ ]+(, …)?\), "
                       r"which is not read: LoRA, .* are; merge it"):  # fmt: skip
        parse_adapter(file, {}, "style")


def test_pefts_rotations_are_read_by_its_configuration_alone(tmp_path):
    file = CASES["PEFT oft"].file
    with pytest.raises(CascadeError, match=r"is an OFT whose file does not say how .* adapter_config\.json"):
        parse_adapter(file, {}, "a")
    config = configuration("PEFT oft")
    assert config is not None
    for entry, value, words in (
        ("peft_version", "0.17.1", r"OFT of PEFT '0\.17\.1'"),
        ("num_cayley_neumann_terms", 10**9, "at most 100 are read"),
        ("use_cayley_neumann", "no", "does not say how"),
    ):
        config_before, config[entry] = config[entry], value
        with pytest.raises(CascadeError, match=words):
            read("PEFT oft", tmp_path)
        config[entry] = config_before


def test_oftens_constraint_is_lycoris_or_comfyuis():
    """LyCORIS states it for one row, ComfyUI's trainer for all of them."""
    blocks, alpha = torch.randn(4, 2, 2), torch.tensor(0.1)
    constraints = []
    for prefix in ("lycoris_", "diffusion_model."):
        file = {
            f"{prefix}clip_txt_mapper.{part}": t for part, t in (("oft_blocks", blocks), ("alpha", alpha))
        }
        constraints.append(getattr(parse_adapter(file, {}, "a").stage_c["clip_txt_mapper"], "constraint"))  # noqa: B009
    assert constraints == pytest.approx([0.8, 0.1])


def test_differences_of_the_fused_attention_input():
    block = "lora_unet_up_blocks_0_2_attention_attn_in_proj"
    weight, bias = torch.randn(12, 4), torch.randn(12)
    changes = parse_adapter({f"{block}.diff": weight, f"{block}.diff_b": bias}, {}, "a").stage_c
    names = [f"up_blocks.0.2.attention.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    assert {*changes} == {*names, *(f"{name}.bias" for name in names)}
    thirds = [changed_weight(torch.zeros(4, 4), changes[name], 1.0) for name in names]
    assert torch.equal(torch.cat(thirds), weight)
    assert torch.equal(
        torch.cat([changed_weight(torch.zeros(4), changes[f"{n}.bias"], 1.0) for n in names]), bias
    )
    fused = {f"{block}.lokr_w1": torch.ones(3, 2), f"{block}.lokr_w2": torch.ones(4, 2)}
    with pytest.raises(CascadeError, match="a change by LoKr for q, k and v together, which cannot be split"):
        parse_adapter(fused, {}, "a")


def broken(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"lora_unet_clip_txt_mapper.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (broken(hada_w1_a=torch.ones(8, 2)), "has no hada_w1_b, which belongs to hada_w1_a"),
        (
            broken(hada_w1_a=torch.ones(8, 2), hada_w1_b=torch.ones(2, 6), hada_w2_a=torch.ones(8, 3),
                   hada_w2_b=torch.ones(3, 6)),
            "tensors of LoHa that do not belong together",
        ),
        (broken(lokr_w1=torch.ones(2, 2), lokr_w2_a=torch.ones(4, 1), lokr_w2_b=torch.ones(2, 3)), "of LoKr that do"),
        (broken(lokr_w1=torch.ones(2, 2)), "has no lokr_w2_a"),
        (broken(oft_blocks=torch.ones(4, 2, 3)), "of OFT that do not"),
        (broken(oft_blocks=torch.ones(9, 4, 2, 2)), "of OFT that do not"),
        (broken(oft_blocks=torch.ones(4, 2, 2), rescale=torch.ones(7)), "of OFT that do not"),
        (broken(boft_R=torch.ones(3, 3, 2, 2), boft_s=torch.ones(8)), "of OFT that do not"),
        (broken(on_input=torch.tensor(0)), r"of \(IA\)³ that do not"),
        (broken(ia3_l=torch.ones(2, 2)), "cannot be told whether it scales rows or columns"),
        (
            broken(oft_blocks=torch.ones(4, 2, 2), dora_scale=torch.ones(8, 1)),
            "has magnitude beside OFT, which is not known to belong to it",
        ),
        (broken(diff=torch.ones(2, 2, 2)), r"diff of the shape \(2, 2, 2\), but 1 or 2 or 4 dimensions"),
        (broken(diff_b=torch.ones(0)), r"diff_b of the shape \(0,\)"),
        (broken(diff=torch.ones(8, 6, dtype=torch.int8)), "int8, but floating point"),
        (
            {**broken(diff=torch.ones(8, 6)), "lora_unet_clip_txt_mapper.lora_down.weight": torch.ones(2, 6),
             "lora_unet_clip_txt_mapper.lora_up.weight": torch.ones(8, 2)},
            r"changed in several ways \(LoRA and a difference\)",
        ),
        (
            {"lora_unet_down_blocks_0_0_depthwise.lora_mid.weight": torch.ones(1, 1, 999, 999),
             "lora_unet_down_blocks_0_0_depthwise.lora_down.weight": torch.ones(1, 999, 1, 1),
             "lora_unet_down_blocks_0_0_depthwise.lora_up.weight": torch.ones(8, 1, 1, 1)},
            "is in Tucker form, but its core",
        ),
    ],
)  # fmt: skip
def test_what_does_not_belong_together(file, words):
    with pytest.raises(CascadeError, match=words):
        parse_adapter(file, {}, "a")


@pytest.mark.parametrize("algorithm", ["LoKr", "LoHa", "OFT"])
def test_huge_products_are_not_built(algorithm):
    """A file of a few kilobytes may speak of a matrix of terabytes."""
    long, wide = torch.ones(40_000, 1), torch.ones(1, 40_000)
    pairs = {
        "LoKr": {"lokr_w1_a": long, "lokr_w1_b": wide, "lokr_w2_a": long, "lokr_w2_b": wide},
        "LoHa": {"hada_w1_a": long, "hada_w1_b": wide, "hada_w2_a": long, "hada_w2_b": wide},
        "OFT": {"oft_blocks": torch.ones(1, 2, 2).expand(40_000, 2, 2)},
    }
    adapter = parse_adapter(broken(**pairs[algorithm]), {}, "a")
    check_finite_changes(adapter.stage_c, "a")
    with pytest.raises(CascadeError, match=r"is a LoRA for another Stage C: .* have another size"):
        check_fits(adapter, CONFIG)


SIZES = [
    *(
        (),
        (0,),
        (1,),
        (2,),
        (8,),
        (4, 8),
        (8, 2),
        (2, 6),
        (8, 6),
        (2, 2),
        (4, 2),
        (2, 3),
        (1, 8),
        (8, 1),
        (1, 6),
    ),
    *((6, 1), (3, 1), (8, 9), (2, 9), (2, 8), (4, 2, 2), (1, 2, 2), (3, 4, 2, 2), (1, 4, 2, 2), (2, 2, 1, 1)),
    *((2, 2, 3, 3), (8, 1, 3, 3), (2, 1, 3, 3)),
]
LAYERS = ["clip_txt_mapper", "down_blocks.0.0.depthwise", "clf.1", "up_blocks.0.2.attention.attn.in_proj"]


def random_layer(pick: random.Random) -> dict[str, torch.Tensor]:
    """Parts of one or two algorithms, of shapes that fit now and then."""
    parts = sorted({*ENDINGS, *WHOLE})
    family = pick.choice(["hada", "lokr", "oft", "lora", "ia3", ""])
    chosen = [part for part in parts if family in part and pick.random() < 0.8] + pick.sample(
        parts, pick.randint(0, 2)
    )
    prefix = pick.choice(["lora_unet_", "diffusion_model.", "base_model.model.", "lycoris_"])
    layer = pick.choice(LAYERS)
    dtypes = [torch.float32] * 20 + [torch.float16, torch.int64]
    return {
        f"{prefix}{layer}{part}": torch.ones(pick.choice(SIZES), dtype=pick.choice(dtypes)) for part in chosen
    }


def damaged_file(pick: random.Random) -> tuple[dict[str, torch.Tensor], StatedAlpha | None]:
    """A file of another program in which a tensor is missing or has another shape."""
    name = pick.choice(list(CASES))
    file, config = dict(CASES[name].file), configuration(name)
    for key in pick.sample(sorted(file), pick.randint(0, 3)):
        if pick.random() < 0.2:
            del file[key]
        else:
            file[key] = torch.ones(pick.choice(SIZES))
    return file, None if config is None else StatedAlpha(lambda layer, rank: 1.0, "", config)


def test_whatever_a_file_holds_is_read_or_refused_in_words():
    read = applied = 0
    for seed in range(2000):
        pick = random.Random(seed)
        file, stated = damaged_file(pick) if seed % 2 else (random_layer(pick), None)
        with suppress(CascadeError):
            adapter = parse_adapter(file, {}, "a", alpha=stated)
            read += 1
            assert describe_adapter(adapter)
            for dialect in DIALECTS:
                with suppress(CascadeError):
                    to_dialect(adapter, dialect, CONFIG)
            for target, change in changes_of(adapter).items():
                for shape in ((8,), (8, 6), (8, 8), (32, 8), (8, 1, 3, 3), (4, 8, 1, 1)):
                    if change.fits(shape):
                        applied += 1
                        assert changed_weight(torch.ones(shape), change, 0.5).shape == shape, target
    assert read > 300
    assert applied > 1500


def test_nan_is_named_in_any_change():
    change = Kronecker(torch.ones(2, 2), torch.tensor([[torch.nan]]))
    with pytest.raises(CascadeError, match="NaN or infinity in right of a"):
        check_finite_changes({"a": change}, "file")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_applied_in_float32(dtype, tmp_path):
    for name in (
        "LyCORIS loha",
        "LyCORIS oft",
        "LyCORIS lokr",
        "LyCORIS full",
        "LyCORIS ia3",
        "PEFT boft butterfly",
    ):
        for target, change in changes_of(read(name, tmp_path)).items():
            halves = {part: tensor.to(dtype) for part, tensor in change.tensors().items()}
            half, exact = (
                change.with_tensors(halves),
                change.with_tensors({p: t.float() for p, t in halves.items()}),
            )
            weight = before(target, tuple(CASES[name].changed[target].shape))
            assert torch.equal(changed_weight(weight, half, 1.0), changed_weight(weight, exact, 1.0))


def test_a_lora_is_not_taken_for_another_algorithm():
    """kohya's and PEFT's plain files give the plain change."""
    for name in ("LyCORIS lora", "LyCORIS dora", "LyCORIS lora tucker"):
        adapter = parse_adapter(CASES[name].file, {}, "a")
        assert all(isinstance(change, LowRank) for change in adapter.stage_c.values())
