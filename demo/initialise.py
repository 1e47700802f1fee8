"""The published initial weights of Stage A, B and C."""

from math import sqrt

from torch import nn

from cascade_nodes.cascade_core.networks.layers import FeedForwardBlock, ResBlock, TimestepBlock
from cascade_nodes.cascade_core.networks.stage_a import MixingResidualBlock, StageA
from cascade_nodes.cascade_core.networks.unet import UNet

_CONDITION_MAPPERS = ("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "clip_mapper")
_MAP_MAPPERS = ("effnet_mapper", "pixels_mapper")


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise_unet(model: UNet) -> UNet:
    """Stage B or C: residual branches start small, timestep blocks as the identity, and the output at zero."""
    model.apply(_xavier)
    for name in _CONDITION_MAPPERS:
        if hasattr(model, name):
            nn.init.normal_(getattr(model, name).weight, std=0.02)
    for name in _MAP_MAPPERS:
        if hasattr(model, name):
            nn.init.normal_(getattr(model, name)[0].weight, std=0.02)
            nn.init.normal_(getattr(model, name)[2].weight, std=0.02)
    nn.init.xavier_uniform_(model.get_parameter("embedding.1.weight"), 0.02)
    nn.init.zeros_(model.get_parameter("clf.1.weight"))
    depth = sum(model.config.blocks[0])
    for block in model.modules():
        if isinstance(block, ResBlock | FeedForwardBlock):
            block.get_parameter("channelwise.4.weight").data *= sqrt(1 / depth)
        elif isinstance(block, TimestepBlock):
            for layer in block.children():
                nn.init.zeros_(layer.get_parameter("weight"))
    return model


def initialise_stage_a(model: StageA) -> StageA:
    """Xavier inside the residual blocks; the other layers keep torch's own initial weights."""
    for module in model.modules():
        if isinstance(module, MixingResidualBlock):
            module.apply(_xavier)
    return model
