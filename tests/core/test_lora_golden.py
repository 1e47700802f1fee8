"""One LoRA in four dialects, fused by hand into Stage C's weights: what an adapter of each has to come to."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageC, load_published_state_dict
from cascade_nodes.tests.golden_weights import read_golden, relative_error

LORA, ABOUT = read_golden("stage_c_lora")
STAGE_C, STAGE_C_ABOUT = read_golden("stage_c")
RANK = ABOUT["rank"]
ORDER: list[str] = ABOUT["order"]  # the published keys, in the official file's numbering
CHANNELS = 64
INPUTS = [STAGE_C[f"in.{name}"] for name in ("x", "r", "clip_text", "clip_text_pooled", "clip_img")]

Deltas = Iterator[tuple[str, slice, Tensor]]  # published key, its rows, what is added to them


class SplitDialect(NamedTuple):
    """A dialect with a module each for q, k, v and the output; `{}` stands for the attention block."""

    block: str
    separator: str  # between the parts of the block's name
    parts: tuple[str, str, str, str]  # q, k, v, output
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str | None = ".alpha"  # None where alpha / rank is folded into `up`


NATIVE = ("_attn_to_q", "_attn_to_k", "_attn_to_v", "_attn_out_proj")
DIFFUSERS = (".to_q", ".to_k", ".to_v", ".to_out.0")
SPLIT = {
    "kohya": SplitDialect("lora_unet_{}", "_", NATIVE),
    "onetrainer": SplitDialect("lora_prior_unet_{}", "_", NATIVE),
    "diffusers": SplitDialect("prior.{}", ".", DIFFUSERS, ".lora_A.weight", ".lora_B.weight", None),
}


def of(dialect: str) -> dict[str, Tensor]:
    """The dialect's own file."""
    return {key[len(dialect) + 1 :]: value for key, value in LORA.items() if key.startswith(f"{dialect}.")}


def official_deltas(file: dict[str, Tensor]) -> Deltas:
    """Numbered pairs for the fused weights, alpha 1 by design."""
    for i, key in enumerate(ORDER):
        down, up = file.pop(f"weights.{i}.lora_down"), file.pop(f"weights.{i}.lora_up")
        assert down.shape[0] == RANK
        yield key, slice(0, up.shape[0]), up @ down / RANK


def split_deltas(file: dict[str, Tensor], dialect: SplitDialect) -> Deltas:
    """q, k and v go to the first, second and third block of rows of the fused weight."""
    for attention in sorted({key.split(".attn.")[0] for key in ORDER}):
        block = dialect.block.format(attention.replace(".", dialect.separator))
        for i, part in enumerate(dialect.parts):
            down, up = file.pop(block + part + dialect.down), file.pop(block + part + dialect.up)
            assert down.shape[0] == RANK
            scale = file.pop(block + part + dialect.alpha).item() / RANK if dialect.alpha else 1.0
            if i < 3:
                rows = slice(i * CHANNELS, (i + 1) * CHANNELS)
                yield f"{attention}.attn.in_proj_weight", rows, up @ down * scale
            else:
                yield f"{attention}.attn.out_proj.weight", slice(0, CHANNELS), up @ down * scale


def stage_c_output(deltas: Deltas) -> Tensor:
    """Stage C's prediction for its golden inputs with the deltas added to its golden weights."""
    prefix = "weights."
    weights = {key[len(prefix) :]: w.clone() for key, w in STAGE_C.items() if key.startswith(prefix)}
    for key, rows, delta in deltas:
        weights[key][rows] += delta
    model = load_published_state_dict(StageC.from_config(STAGE_C_ABOUT["config"]), weights).eval()
    with torch.no_grad():
        return model(*INPUTS)


def test_official():
    file = of("official")
    assert relative_error(stage_c_output(official_deltas(file)), LORA["out.official"]) <= 1e-5
    assert sorted(file) == ["embeddings.embeddings", "embeddings.indices"]  # the rest was used


@pytest.mark.parametrize("name", list(SPLIT))
def test_split_dialects(name):
    file = of(name)
    assert relative_error(stage_c_output(split_deltas(file, SPLIT[name])), LORA["out.official"]) <= 1e-5
    assert not file  # all of it was used


def test_every_dialect_says_the_same():
    """The deltas themselves: each covers every row of every module once."""
    official = {key: delta for key, _, delta in official_deltas(of("official"))}
    assert list(official) == ORDER
    for name, dialect in SPLIT.items():
        fused = {key: torch.full_like(delta, torch.nan) for key, delta in official.items()}
        for key, rows, delta in split_deltas(of(name), dialect):
            fused[key][rows] = delta
        assert all(relative_error(fused[key], official[key]) <= 1e-5 for key in ORDER), name


def test_the_lora_changes_the_output():
    assert relative_error(stage_c_output(iter(())), STAGE_C["out"]) <= 1e-5
    assert relative_error(STAGE_C["out"], LORA["out.official"]) > 1e-2


def test_retoken_adds_to_its_rows_alone():
    rows = LORA["retoken.before"].clone()  # (tokens, C)
    for index, embedding in zip(
        LORA["official.embeddings.indices"].tolist(), LORA["official.embeddings.embeddings"], strict=True
    ):
        rows[index] += embedding
    assert relative_error(rows, LORA["retoken.after"]) <= 1e-5
    changed = (LORA["retoken.after"] != LORA["retoken.before"]).any(dim=1).nonzero().flatten()
    assert changed.tolist() == sorted(LORA["official.embeddings.indices"].tolist())


def test_every_tensor_is_known():
    groups = {key.split(".")[0] for key in LORA}
    assert groups == {"official", *SPLIT, "out", "retoken"}
    assert {key for key in LORA if key.startswith(("out.", "retoken."))} == {
        "out.official",
        "retoken.before",
        "retoken.after",
    }
