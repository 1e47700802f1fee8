"""Configurations read back from names and shapes, one function per network.

Each takes {name: shape} and returns the published constructor's arguments, or None where the names are of something
else. What shapes do not tell (dropout, Stage A's scale, level switching) is as published; heads are 64 wide.
"""

from collections.abc import Mapping
from math import log2
from typing import Any

from .config import PUBLISHED_HEAD_WIDTH

Shapes = Mapping[str, tuple[int, ...]]

# The name after `….N.` that gives a block's kind away, in the order to test: a ResBlock has a `channelwise` too.
_BLOCK_SIGNATURES = (
    ("depthwise.weight", "C"),
    ("kv_mapper.1.weight", "A"),
    ("mapper.weight", "T"),
    ("channelwise.0.weight", "F"),
)


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered children `prefix` has."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _block_kinds(shapes: Shapes, prefix: str) -> str:
    """The kinds of a level's blocks in order, such as CTACTA."""
    kinds = ""
    while True:
        block = f"{prefix}{len(kinds)}."
        kind = next((kind for name, kind in _BLOCK_SIGNATURES if block + name in shapes), None)
        if kind is None:
            return kinds
        kinds += kind


def _period(kinds: str) -> tuple[str, int]:
    """The shortest pattern that repeats to `kinds`, and how often."""
    for length in range(1, len(kinds) + 1):
        if kinds == kinds[:length] * (len(kinds) // length):
            return kinds[:length], len(kinds) // length
    return "", 0


def _infer_unet(shapes: Shapes, patch_size: int) -> dict[str, Any]:
    levels = _count(shapes, "down_blocks.")
    down = [_period(_block_kinds(shapes, f"down_blocks.{i}.")) for i in range(levels)]
    up = [_period(_block_kinds(shapes, f"up_blocks.{i}.")) for i in range(levels)]  # innermost first
    widths = [shapes[f"down_blocks.{i}.0.depthwise.weight"][0] for i in range(levels)]
    mapper = next(name[: -len(".weight")] for name in shapes if name.endswith(".mapper.weight"))
    t_conds = [name for name in ("sca", "crp") if f"{mapper}_{name}.weight" in shapes]
    return {
        "c_in": shapes["embedding.1.weight"][1] // patch_size**2,
        "c_out": shapes["clf.1.weight"][0] // patch_size**2,
        "c_r": shapes[f"{mapper}.weight"][1],
        "patch_size": patch_size,
        "c_hidden": widths,
        "nhead": [
            max(width // PUBLISHED_HEAD_WIDTH, 1) if "A" in kinds else -1
            for width, (kinds, _) in zip(widths, down, strict=True)
        ],
        "blocks": [[count for _, count in down], [count for _, count in up]],
        "block_repeat": [
            [_count(shapes, f"{direction}_repeat_mappers.{i}.") + 1 for i in range(levels)]
            for direction in ("down", "up")
        ],
        "level_config": [kinds for kinds, _ in down],
        "kernel_size": shapes["down_blocks.0.0.depthwise.weight"][-1],
        "t_conds": t_conds,
    }


def infer_stage_c(shapes: Shapes) -> dict[str, Any] | None:
    """Stage C has one mapper for the text states, which Stage B lacks."""
    if (
        not {"clip_txt_mapper.weight", "clip_img_mapper.weight", "embedding.1.weight", "clf.1.weight"}
        <= shapes.keys()
    ):
        return None
    config = _infer_unet(shapes, patch_size=1)
    c_cond, c_clip_text = shapes["clip_txt_mapper.weight"]
    pooled_rows, c_clip_text_pooled = shapes["clip_txt_pooled_mapper.weight"]
    return config | {
        "c_cond": c_cond,
        "c_clip_text": c_clip_text,
        "c_clip_text_pooled": c_clip_text_pooled,
        "c_clip_img": shapes["clip_img_mapper.weight"][1],
        "c_clip_seq": pooled_rows // c_cond,
        "dropout": [0.1 if heads > 0 else 0 for heads in config["nhead"]],
        "switch_level": [False] * (len(config["c_hidden"]) - 1),
    }


def infer_stage_b(shapes: Shapes) -> dict[str, Any] | None:
    """Stage B maps Stage C's latent (`effnet_mapper`)."""
    if (
        not {"effnet_mapper.0.weight", "clip_mapper.weight", "embedding.1.weight", "clf.1.weight"}
        <= shapes.keys()
    ):
        return None
    config = _infer_unet(shapes, patch_size=2)
    key_values = [shape[1] for name, shape in shapes.items() if name.endswith("kv_mapper.1.weight")]
    clip_rows, c_clip = shapes["clip_mapper.weight"]
    c_cond = key_values[0] if key_values else clip_rows // 4
    return config | {
        "c_cond": c_cond,
        "c_clip": c_clip,
        "c_clip_seq": clip_rows // c_cond,
        "c_effnet": shapes["effnet_mapper.0.weight"][1],
        "c_pixels": shapes["pixels_mapper.0.weight"][1],
        "dropout": [0.1 if heads > 0 else 0 for heads in config["nhead"]],
    }


def infer_stage_a(shapes: Shapes) -> dict[str, Any] | None:
    """Stage A is the network with a codebook."""
    if not {"vquantizer.codebook.weight", "in_block.1.weight", "up_blocks.0.0.weight"} <= shapes.keys():
        return None
    codebook_size, c_latent = shapes["vquantizer.codebook.weight"]
    c_hidden = shapes["up_blocks.0.0.weight"][0]
    levels = int(log2(c_hidden // shapes["in_block.1.weight"][0])) + 1
    blocks = sum(name.startswith("up_blocks.") and name.endswith(".gammas") for name in shapes)
    return {
        "levels": levels,
        "bottleneck_blocks": blocks - (levels - 1),
        "c_hidden": c_hidden,
        "c_latent": c_latent,
        "codebook_size": codebook_size,
        "scale_factor": 0.43,
    }


def infer_previewer(shapes: Shapes) -> dict[str, Any] | None:
    """The previewer is one sequence of convolutions that ends at number 24."""
    if not {"blocks.0.weight", "blocks.2.running_mean", "blocks.24.weight"} <= shapes.keys():
        return None
    c_hidden, c_in = shapes["blocks.0.weight"][:2]
    return {"c_in": c_in, "c_hidden": c_hidden, "c_out": shapes["blocks.24.weight"][0]}
