"""Networks whose residual stream runs past the end of fp16, while what they put out stays as it was."""

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.networks.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock
from cascade_nodes.cascade_core.networks.unet import UNet

STAGE_C = {
    "c_in": 16, "c_out": 16, "c_r": 64, "patch_size": 1, "c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2],
    "blocks": [[1, 2], [2, 1]], "block_repeat": [[1, 2], [1, 2]], "level_config": ["CTA", "CTAF"], "c_clip_text": 32,
    "c_clip_text_pooled": 32, "c_clip_img": 24, "c_clip_seq": 4, "kernel_size": 3, "dropout": [0, 0],
    "self_attn": True, "t_conds": ["sca", "crp"], "switch_level": [True],
}  # fmt: skip
STAGE_B = {
    "c_in": 4, "c_out": 4, "c_r": 64, "patch_size": 2, "c_cond": 64, "c_hidden": [64, 64], "nhead": [-1, 2],
    "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [2, 1]], "level_config": ["CT", "CTA"], "c_clip": 64,
    "c_clip_seq": 4, "c_effnet": 16, "c_pixels": 3, "kernel_size": 3, "dropout": [0, 0], "self_attn": True,
    "t_conds": ["sca"],
}  # fmt: skip
GROWTH = 40_000.0


@torch.no_grad()
def overflowing(network: UNet, growth: float = GROWTH, seed: int = 0) -> UNet:
    """The network with new random weights by which all that is added to its residual stream is `growth` times as much.

    What reads the stream is normed, but for the skips, whose weights are that much less.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 and "channelwise.2" not in name else 16
        weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
    for block in network.modules():
        _grow(block, growth)
    for resampler in (*network.down_downscalers, *network.up_upscalers):
        for layer in resampler.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                _times(layer, growth)
    for mappers in (network.down_repeat_mappers, network.up_repeat_mappers):
        for mapper in mappers.modules():
            if isinstance(mapper, nn.Conv2d):
                mapper.get_parameter("bias").mul_(growth)
    return network.eval().requires_grad_(False)


def _grow(block: nn.Module, growth: float) -> None:
    if isinstance(block, ResBlock):
        own = len(block.depthwise.weight)  # channels of the block itself, before the skip's
        block.depthwise.bias.mul_(growth)
        block.channelwise.get_parameter("0.weight")[:, own:].div_(growth)
    if isinstance(block, ResBlock | FeedForwardBlock):
        _times(block.channelwise[4], growth)
    if isinstance(block, AttnBlock):
        _times(block.attention.attn.out_proj, growth)
    if isinstance(block, TimestepBlock):
        for parameter in block.parameters():
            scale, shift = parameter.chunk(2)
            scale.mul_(0.3)
            shift.mul_(growth)


def _times(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter.mul_(factor)


class Largest:
    """Inside the block, `value` is the largest number that any block gave out."""

    def __init__(self, network: nn.Module):
        blocks = (ResBlock, AttnBlock, TimestepBlock, FeedForwardBlock)
        self.value = 0.0
        self.hooks = [
            block.register_forward_hook(self._look)
            for block in network.modules()
            if isinstance(block, blocks)
        ]

    def _look(self, block: nn.Module, inputs: tuple, out: Tensor) -> None:
        self.value = max(self.value, out.abs().max().item())

    def __enter__(self) -> "Largest":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
