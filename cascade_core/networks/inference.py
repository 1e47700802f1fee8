"""Configurations read back from names and shapes, one function per network.

Each takes {name: shape} and returns the published constructor's arguments, or None where the names belong to
another network. Values that shapes do not show (dropout, Stage A's scale, level switching) are the published ones;
heads are 64 wide.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from itertools import count
from math import log2
from typing import Any

from ..errors import CascadeError, printable
from .config import (
    PUBLISHED_BLOCKS,
    PUBLISHED_HEAD_WIDTH,
    PUBLISHED_LARGE,
    PUBLISHED_LAST,
    PUBLISHED_STAGES,
    PUBLISHED_STEM,
    CompressorConfig,
    ControlNetConfig,
    EfficientNetStage,
    NetworkConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)

Shapes = Mapping[str, tuple[int, ...]]

_CONFIG_NAMES = {
    field.name
    for config in (
        StageAConfig,
        StageBConfig,
        StageCConfig,
        CompressorConfig,
        PreviewerConfig,
        ControlNetConfig,
    )
    for field in fields(config)
}


def infer_config(
    state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """Reads the kind and the configuration of a checkpoint back from its names and shapes.

    state_dict: published (or split-attention) names, to anything that has a `shape`; metadata: of the safetensors
    header, whose JSON `config` takes precedence over the shapes, but cannot ask for more blocks than there are
    tensors.
    Kinds: stage_a stage_b stage_c compressor previewer controlnet. Raises CascadeError for any other checkpoint.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    for kind, infer, config_class in (
        ("stage_c", infer_stage_c, StageCConfig),
        ("stage_b", infer_stage_b, StageBConfig),
        ("stage_a", infer_stage_a, StageAConfig),
        ("previewer", infer_previewer, PreviewerConfig),
        ("controlnet", infer_controlnet, ControlNetConfig),
        ("compressor", infer_compressor, CompressorConfig),
    ):
        try:
            config = infer(shapes)
        except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else "some shapes are not its own"
            raise CascadeError(
                f"These {len(shapes)} tensors are named as a Stable Cascade network's ({kind}), but {reason}; "
                "download the file again."
            ) from error
        if config is not None:
            _check_blocks_are_known(config, metadata, len(shapes))
            return kind, completed(config_class, config, stated_config(metadata), len(shapes))
    first = ", ".join(map(printable, list(shapes)[:3]))
    raise CascadeError(
        f"These {len(shapes)} tensors (first: {first}) are of no Stable Cascade network; "
        "expected Stage A, B or C, the semantic compressor, the previewer or a ControlNet, in their published names."
    )


def _check_blocks_are_known(
    inferred: Mapping[str, Any], metadata: Mapping[str, str] | None, tensors: int
) -> None:
    """Raises CascadeError for a ControlNet whose target blocks are stated nowhere."""
    if {"proj_blocks": True, **inferred, **stated_config(metadata)}["proj_blocks"] == []:
        raise CascadeError(
            "nothing says which of Stage C's residual blocks this ControlNet's projections are for; write the "
            "controlnet_blocks of its training, such as controlnet_blocks: [0, 4, 8, 12], into a YAML file of its name "
            "beside it (my_net.yaml beside my_net.safetensors)."
        )


def completed(
    config_class: type[NetworkConfig], inferred: dict[str, Any], stated: Mapping[str, Any], tensors: int
) -> dict[str, Any]:
    """A stated configuration, completed from the tensors; widths are compared later, when the network is built.

    Raises CascadeError for values that no network has, and for more blocks than there are tensors, so that the file
    bounds the size of the network built (without values) from it.
    """
    config = {**inferred, **stated}
    blocks = config_class.from_dict(config).block_count
    if blocks > tensors:
        raise CascadeError(
            f"the config in its metadata asks for {blocks} blocks, but there are only {tensors} tensors; download "
            "the file again."
        )
    return config


def stated_config(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON `config` of a safetensors header; empty where there is none, or where it is another program's.

    Other programs store trainer settings or plain text under this name. A table counts as a network's config if most
    of its names are those of a configuration here.
    """
    config = stated_table(metadata)
    ours = len(_CONFIG_NAMES & set(config))
    return config if ours > len(config) - ours else {}


def stated_table(metadata: Mapping[str, str] | None, key: str = "config") -> dict[str, Any]:
    """A table in JSON under a key of a safetensors header; empty for anything else."""
    try:
        table = json.loads((metadata or {}).get(key) or "{}")
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


# Names after `….N.` that identify a block's kind, in the order of testing, since a ResBlock also has a `channelwise`.
_BLOCK_SIGNATURES = (
    ("depthwise.weight", "C"),
    ("kv_mapper.1.weight", "A"),
    ("mapper.weight", "T"),
    ("channelwise.0.weight", "F"),
)


def _count(shapes: Shapes, template: str) -> int:
    """Number of tensors whose names fit the template, numbered from 0 on at its `{}`."""
    return next(number for number in count() if template.format(number) not in shapes)


def _block_kinds(shapes: Shapes, prefix: str) -> str:
    """The kinds of a level's blocks in order, such as CTACTA."""
    kinds: list[str] = []
    while True:
        block = f"{prefix}{len(kinds)}."
        kind = next((kind for name, kind in _BLOCK_SIGNATURES if block + name in shapes), None)
        if kind is None:
            return "".join(kinds)
        kinds.append(kind)


def _period(kinds: str) -> tuple[str, int]:
    """The shortest pattern that repeats to `kinds`, and how often."""
    length = (kinds + kinds).find(kinds, 1)  # the first rotation that changes nothing
    return (kinds[:length], len(kinds) // length) if kinds else ("", 0)


def _infer_unet(shapes: Shapes, patch_size: int) -> dict[str, Any]:
    levels = _count(shapes, "down_blocks.{}.0.depthwise.weight")
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
            [_count(shapes, f"{direction}_repeat_mappers.{i}.{{}}.weight") + 1 for i in range(levels)]
            for direction in ("down", "up")
        ],
        "level_config": [kinds for kinds, _ in down],
        "kernel_size": shapes["down_blocks.0.0.depthwise.weight"][-1],
        "t_conds": t_conds,
    }


def infer_stage_c(shapes: Shapes) -> dict[str, Any] | None:
    """Infers Stage C, which alone has a mapper for the text encoder's states."""
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
    """Infers Stage B, which maps Stage C's latent (`effnet_mapper`)."""
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
    """Infers Stage A, the network with a codebook."""
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
    """Infers the previewer, one sequence of convolutions that ends at number 24."""
    if not {"blocks.0.weight", "blocks.2.running_mean", "blocks.24.weight"} <= shapes.keys():
        return None
    c_hidden, c_in = shapes["blocks.0.weight"][:2]
    return {"c_in": c_in, "c_hidden": c_hidden, "c_out": shapes["blocks.24.weight"][0]}


def infer_compressor(shapes: Shapes) -> dict[str, Any] | None:
    """Config of the compressor whose state dict has these keys and shapes, or None where it is not one.

    A published backbone is left out, so that its file gives `{"c_latent": 16}`; any other is returned in full.
    """
    mapper = shapes.get("mapper.0.weight")
    if mapper is None or len(mapper) != 4 or "mapper.1.running_mean" not in shapes:
        return None
    backbone = infer_efficientnet(shapes, "backbone.")
    if backbone is None or backbone.pop("c_in") != 3 or mapper[1] != backbone["c_last"]:
        return None
    return {"c_latent": mapper[0], **_unpublished(backbone)}


def _unpublished(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `stem stages c_last` of an EfficientNetV2; none where it is the published one."""
    published = {
        "stem": PUBLISHED_STEM,
        "stages": [list(stage) for stage in PUBLISHED_STAGES],
        "c_last": PUBLISHED_LAST,
    }
    return {} if backbone == published else dict(backbone)


def infer_controlnet(shapes: Shapes) -> dict[str, Any] | None:
    """Config of the ControlNet whose state dict has these keys and shapes, or None where it is not one.

    The widths of a published backbone are left out, those of another are returned whole. Which blocks the
    projections are for is not in the shapes: 8 or 64 projections mean the published lists; for any other number the
    blocks have to be stated elsewhere, and the result has none.
    """
    projections = _count(shapes, "projections.{}.0.weight")
    inner, outer = shapes.get("projections.0.0.weight"), shapes.get("projections.0.2.weight")
    backbone = _infer_backbone(shapes)
    if backbone is None or inner is None or outer is None or len(inner) != 4 or len(outer) != 4:
        return None
    mode, c_last, config = backbone
    if inner[:2] != (c_last, c_last) or outer[1] != c_last:
        return None
    return {
        "c_in": config.pop("c_in"),
        "c_proj": outer[0],
        "proj_blocks": list(PUBLISHED_BLOCKS.get(projections, ())),
        "bottleneck_mode": mode,
        **config,
    }


def _infer_backbone(shapes: Shapes) -> tuple[str, int, dict[str, Any]] | None:
    """(mode, c_last, the arguments c_in and, where they are not the published ones, the widths), or None."""
    effnet = infer_efficientnet(shapes, "backbone.")
    if effnet is not None:
        c_in, c_last = effnet.pop("c_in"), effnet["c_last"]
        return "effnet", c_last, {"c_in": c_in, **_unpublished(effnet)}
    first, second = shapes.get("backbone.0.weight"), shapes.get("backbone.2.weight")
    if first is None or second is None or len(first) != 4 or len(second) != 4 or first[0] != second[1]:
        return None
    c_wide, c_in = first[:2]
    if first[2:] == (3, 3) == second[2:]:
        widths, published = {"c_wide": c_wide, "c_last": second[0]}, {"c_wide": 4 * c_in, "c_last": c_in}
        return "simple", second[0], {"c_in": c_in, **({} if widths == published else widths)}
    layers = next(n for n in count() if f"backbone.{3 + n}.blocks.0.weight" not in shapes)
    last = shapes.get(f"backbone.{3 + layers}.weight")
    if first[2:] != (1, 1) or last is None or len(last) != 4 or last[1] != second[0]:
        return None
    widths = {"c_wide": c_wide, "c_hidden": second[0], "layers": layers, "c_last": last[0]}
    return "large", last[0], {"c_in": c_in, **({} if widths == PUBLISHED_LARGE else widths)}


def infer_efficientnet(shapes: Shapes, prefix: str) -> dict[str, Any] | None:
    """Constructor arguments `c_in stem stages c_last` of the network whose keys start with `prefix`, or None.

    Strides leave no trace in shapes: see `published_strides`.
    """
    stem = _conv_shape(shapes, f"{prefix}0.0.weight")
    if stem is None:
        return None
    channels, number, rows = stem[0], 1, []
    while f"{prefix}{number}.0.block.0.0.weight" in shapes:
        row = _infer_stage(shapes, f"{prefix}{number}.", channels)
        if row is None:
            return None
        rows.append(row)
        channels, number = row.c_out, number + 1
    last = _conv_shape(shapes, f"{prefix}{number}.0.weight")
    if not rows or last is None or last[1] != channels:
        return None
    strided = zip(rows, published_strides(len(rows)), strict=True)
    stages = [list(row._replace(stride=stride)) for row, stride in strided]
    return {"c_in": stem[1], "stem": stem[0], "stages": stages, "c_last": last[0]}


def published_strides(count: int) -> tuple[int, ...]:
    """Strides assumed for a table of `count` stages: the published 1 2 2 2 1 2, and ones after it.

    A shorter table halves in its last four stages, which keeps the whole network's stride at 32.
    """
    published = tuple(stage.stride for stage in PUBLISHED_STAGES)
    if count >= len(published):
        return published + (1,) * (count - len(published))
    return ((1,) * len(published) + (2,) * 4)[-count:]


def _infer_stage(shapes: Shapes, prefix: str, c_in: int) -> EfficientNetStage | None:
    """One row of the table from its first block's shapes, with stride 1 for the caller to set, or None."""
    block = f"{prefix}0.block."
    convs = [shape for i in range(4) if (shape := _conv_shape(shapes, f"{block}{i}.0.weight")) is not None]
    gated = any(f"{block}{i}.fc1.weight" in shapes for i in (1, 2))
    if len(convs) not in ((2, 3) if gated else (1, 2)) or (len(convs) > 1 and convs[0][0] % c_in):
        return None
    kernel = convs[-2][2] if gated else convs[0][2]
    expand = convs[-1][1] // c_in if len(convs) > 1 else 1
    layers = 1
    while f"{prefix}{layers}.block.0.0.weight" in shapes:
        layers += 1
    return EfficientNetStage("mbconv" if gated else "fused", expand, kernel, 1, convs[-1][0], layers)


def _conv_shape(shapes: Shapes, key: str) -> tuple[int, ...] | None:
    shape = shapes.get(key)
    return tuple(shape) if shape is not None and len(shape) == 4 else None
