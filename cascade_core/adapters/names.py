"""The layers that a LoRA can change: their names in any spelling, and Stage C's in the published order.

Programs differ in the prefix of a layer's name, in joining its parts by dots or underscores, and in their names for
the attention's layers. The vocabulary is small and regular, so a name is read by a grammar, at any depth.
"""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import nn

from ..networks.config import StageBConfig, StageCConfig
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC

# The attention's layers as programs spell them after "attention." -> our names. One fused input stands for q, k, v.
ATTENTION = {
    **{name: name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.out_proj", "attn.in_proj")},
    "attn.to_out": "attn.out_proj",
    "attn.to_out_proj": "attn.out_proj",  # used by OneTrainer for a few days from 20 February 2024
    "to_q": "attn.to_q",
    "to_k": "attn.to_k",
    "to_v": "attn.to_v",
    "to_out.0": "attn.out_proj",
    "attn.in_proj.0": "attn.to_q",
    "attn.in_proj.1": "attn.to_k",
    "attn.in_proj.2": "attn.to_v",
}
FUSED = "attn.in_proj"
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")

# N is any number, | separates alternatives for one part.
_CONVOLUTIONS = (
    "embedding.N",
    "clf.N",
    "down_blocks|up_blocks.N.N.depthwise",
    "down_downscalers|up_upscalers.N.N.blocks.N",
    "down_repeat_mappers|up_repeat_mappers.N.N",
)
_STAGE_C = (
    *_CONVOLUTIONS,
    "clip_txt_mapper|clip_txt_pooled_mapper|clip_img_mapper",
    "down_blocks|up_blocks.N.N.channelwise.N",
    "down_blocks|up_blocks.N.N.mapper|mapper_[a-z]+",
    "down_blocks|up_blocks.N.N.kv_mapper.N",
    *(f"down_blocks|up_blocks.N.N.attention.{spelled}" for spelled in ATTENTION),
)
_STAGE_B_ALONE = (  # Stage C has none of these, since it has two levels
    "effnet_mapper|pixels_mapper.N",
    "clip_mapper",
    "down_downscalers|up_upscalers.N.N",
)
_TEXT = (
    "text_model.encoder.layers.N.self_attn.q_proj|k_proj|v_proj|out_proj",
    "text_model.encoder.layers.N.mlp.fc1|fc2",
    "text_model.encoder.layers.N.layer_norm1|layer_norm2",
    "text_model.embeddings.token_embedding|position_embedding",
    "text_model.final_layer_norm",
    "text_projection",
)


def _compiled(templates: tuple[str, ...]) -> list[re.Pattern[str]]:
    """Patterns with a group for each part of a name, whichever way the parts are joined."""
    return [
        re.compile(r"[._]".join(f"({part})" for part in template.replace("N", r"\d+").split(".")))
        for template in templates
    ]


_STAGE_C_PATTERNS, _TEXT_PATTERNS = _compiled((*_STAGE_C, *_STAGE_B_ALONE)), _compiled(_TEXT)
_STAGE_B_PATTERNS = _compiled(_STAGE_B_ALONE)
_LEVELS = re.compile(r"(?:down_blocks|up_blocks)\.(\d+)\.")
_CONVOLUTION_PATTERNS = _compiled(_CONVOLUTIONS)


def _dotted(patterns: list[re.Pattern[str]], name: str) -> str | None:
    match = next((match for pattern in patterns if (match := pattern.fullmatch(name))), None)
    return None if match is None else ".".join(match.groups())


def stage_c_layer(name: str) -> str | None:
    """Our name of a layer of Stage C or B, with dots or underscores and any spelling of the attention; else None."""
    dotted = _dotted(_STAGE_C_PATTERNS, name)
    if dotted is None:
        return None
    block, attention, spelled = dotted.partition(".attention.")
    return block + attention + ATTENTION[spelled] if attention else dotted


def is_stage_b(layer: str) -> bool:
    """Whether a layer, by our name, belongs to Stage B alone; Stage C has layers of most names too."""
    level = _LEVELS.match(layer)
    return (level is not None and int(level[1]) > 1) or _dotted(_STAGE_B_PATTERNS, layer) is not None


def text_layer(name: str) -> str | None:
    """transformers' name of a layer of CLIP's text encoder; None for others."""
    return _dotted(_TEXT_PATTERNS, name)


def is_convolution(layer: str) -> bool:
    """Whether a layer of Stage C, by our name, is a convolution: all but the depthwise ones are 1×1."""
    return _dotted(_CONVOLUTION_PATTERNS, layer) is not None


# Stage C's children in the published constructor's order.
_PUBLISHED_CHILDREN = (
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding", "down_blocks", "down_downscalers",
    "down_repeat_mappers", "up_blocks", "up_upscalers", "up_repeat_mappers", "clf",
)  # fmt: skip


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """{layer: its weight's shape} of a network."""
    weights = network.state_dict().items()
    return {name.removesuffix(".weight"): tuple(w.shape) for name, w in weights if name.endswith(".weight")}


def parameter_name(target: str) -> str:
    """The parameter's name of a target, which names a parameter, or a layer and so its weight."""
    return target if target.endswith((".bias", ".gamma", ".beta")) else f"{target}.weight"


def layer_of(target: str) -> str:
    """The layer's name of a target, which names a layer, or another parameter of it than its weight."""
    return parameter_name(target).rpartition(".")[0]


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """{parameter: its shape} of a network; a layer's name stands for its weight."""
    return {name.removesuffix(".weight"): tuple(p.shape) for name, p in network.state_dict().items()}


@cache
def stage_parameters(config: StageCConfig | StageBConfig) -> dict[str, tuple[int, ...]]:
    """{our layer or parameter: its shape} of a Stage C or B."""
    with torch.device("meta"):
        return parameter_shapes(StageC(config) if isinstance(config, StageCConfig) else StageB(config))


@cache
def stage_c_shapes(config: StageCConfig) -> dict[str, tuple[int, ...]]:
    """{our layer: its weight's shape} of a Stage C."""
    with torch.device("meta"):
        return weight_shapes(StageC(config))


def published_layers(config: StageCConfig) -> dict[str, tuple[int, ...]]:
    """{layer: weight's shape} in the order in which the published trainer's `modules()` finds its LoRA modules.

    The attention input is one layer (`attn.in_proj`, 3C rows). It comes after the output projection, because the
    parametrisation of a module's own weight is listed after the module's children.
    """
    shapes = stage_c_shapes(config)
    ordered: dict[str, tuple[int, ...]] = {}
    for layer in sorted(shapes, key=lambda name: _PUBLISHED_CHILDREN.index(name.split(".")[0])):  # stable
        if layer.endswith(QKV):
            continue
        ordered[layer] = shapes[layer]
        if layer.endswith("attn.out_proj"):
            rows, columns = shapes[layer]
            ordered[layer.removesuffix("attn.out_proj") + FUSED] = (3 * rows, columns)
    return ordered


def published_parameter(layer: str) -> str:
    """The published name of a layer's weight: that of the fused attention input does not end in `.weight`."""
    return f"{layer}_weight" if layer.endswith(FUSED) else f"{layer}.weight"
