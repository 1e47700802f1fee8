# pyright: reportMissingImports=false
"""CONTROL_NET in ComfyUI: its ControlBase around a ControlNet of ours.

The host hands residuals on as a list that Stage C pops from its end, one for each of its residual blocks. Lists of
networks that drive different blocks are merged here by the block's number.
"""

from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ....cascade_core import activations, checkpoints
from ....cascade_core.errors import CascadeError


class HostedControl(nn.Module):
    """Computes in the precision of its weights; gives float32."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network: Any = network
        self.name = name

    def forward(self, hint: Tensor) -> list[Tensor | None]:
        weight = next(self.network.parameters())
        residuals = self.network(hint.to(weight.dtype))
        return [None if residual is None else residual.float() for residual in residuals]


class CascadeControl(comfy.controlnet.ControlBase):
    """A ControlNet of ours with its hint, strength and range of steps, as the host's apply nodes set them."""

    def __init__(self, patcher: Any):
        super().__init__()
        self.patcher = patcher
        self.blocks = 0  # residual blocks of the MODEL that is being sampled
        self.residuals: list[Tensor | None] | None = None
        self.size: tuple[int, int] | None = None  # of the latent that the residuals are for

    @property
    def control(self) -> HostedControl:
        """The network and the name of its file."""
        return self.patcher.model

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Before the first step: refuses a MODEL that has no place for what this network gives."""
        super().pre_run(model, percent_to_timestep_function)
        if not isinstance(model, comfy.model_base.StableCascade_C):
            raise CascadeError(
                f"{self.control.name} is a Stable Cascade ControlNet, but the MODEL is a "
                f"{type(model).__name__}; connect Stage C, or another ControlNet."
            )
        config = self.control.network.config
        widths = residual_blocks(model.diffusion_model)
        self.blocks = len(widths)
        for block in config.proj_blocks:
            if block >= self.blocks or widths[block] != config.c_proj:
                there = f"{widths[block]} channels there" if block < self.blocks else f"{self.blocks} blocks"
                raise CascadeError(
                    f"{self.control.name} drives residual block {block} with {config.c_proj} channels, but this "
                    f"Stage C has {there}; choose the ControlNet that was trained for it."
                )

    def get_control(
        self,
        x_noisy: Tensor,
        t: Tensor,
        cond: dict,
        batched_number: int,
        transformer_options: dict | None = None,
    ) -> dict[str, list[Tensor | None]] | None:
        """{"input": residuals, the last block's first}, with the earlier ControlNets' added to them."""
        previous = self.previous_controlnet
        before = previous and previous.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.timestep_range is not None and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return before
        merged: list[Tensor | None] = list(reversed(before["input"])) if before else []
        merged += [None] * (self.blocks - len(merged))
        for block, residual in enumerate(self._residuals(x_noisy)):
            if residual is None:
                continue
            mine = self.strength * for_batch(residual, len(x_noisy), batched_number).to(x_noisy.dtype)
            there = merged[block]
            merged[block] = mine if there is None else there + mine
        return {"input": merged[::-1], "middle": [], "output": []}

    def _residuals(self, x_noisy: Tensor) -> list[Tensor | None]:
        """For the hint's images; computed once for each size of latent."""
        size = (x_noisy.shape[-2], x_noisy.shape[-1])
        residuals = self.residuals
        if residuals is None or self.size != size:
            residuals = self.control(self._hint(size).to(x_noisy.device))
            self.residuals, self.size = residuals, size
        return residuals

    def _hint(self, size: tuple[int, int]) -> Tensor:
        """The hint (B, c_in, h, w) for a latent of this size."""
        config = self.control.network.config
        hint: Any = self.cond_hint_original
        if config.c_in == 1 and hint.shape[1] > 1:
            hint = hint.mean(dim=1, keepdim=True)
        if hint.shape[1] != config.c_in:
            raise CascadeError(
                f"{self.control.name} takes a hint of {config.c_in} channels, but the image has {hint.shape[1]}; "
                "connect the hint that this ControlNet was trained on."
            )
        method = "bilinear" if config.hint_scale > 1 else "nearest-exact"
        height, width = (side * config.hint_scale for side in size)
        return comfy.utils.common_upscale(hint, width, height, method, "center").float()

    def copy(self) -> "CascadeControl":
        """As the host's apply nodes make one for each use; the weights are shared."""
        other = CascadeControl(self.patcher)
        self.copy_to(other)
        return other

    def get_models(self) -> list[Any]:
        """What the host's memory manager must load for a run."""
        return [*super().get_models(), self.patcher]

    def get_models_only_self(self) -> list[Any]:
        """The same without the earlier ControlNets."""
        return [self.patcher]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes that computing the residuals takes beside the weights, in float32."""
        batch, _, height, width = self.cond_hint_original.shape
        values = activations.controlnet(self.control.network.config, batch, height, width)
        return 4 * values + super().inference_memory_requirements(dtype)

    def cleanup(self) -> None:
        """After a run."""
        super().cleanup()
        self.residuals = self.size = None


def residual_blocks(network: Any) -> list[int]:
    """The width of every residual block of Stage C, ours or the host's, in the order in which they run."""
    widths = []
    for levels, mappers in (
        (network.down_blocks, network.down_repeat_mappers),
        (network.up_blocks, network.up_repeat_mappers),
    ):
        for level, repeats in zip(levels, mappers, strict=True):
            blocks = [block for block in level if hasattr(block, "depthwise")]
            widths += [block.depthwise.out_channels for block in blocks] * (len(repeats) + 1)
    return widths


def for_batch(residual: Tensor, batch: int, batched_number: int) -> Tensor:
    """Residuals of the hint's images for a batch that holds all images `batched_number` times."""
    if len(residual) == 1:
        return residual
    images = batch // batched_number
    repeats = -(-images // len(residual))
    return residual.repeat(repeats, 1, 1, 1)[:images].repeat(batched_number, 1, 1, 1)


def load_controlnet(path: Path) -> CascadeControl:
    network, _, _ = checkpoints.load_model(
        path, expect="controlnet", dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(
        HostedControl(network, path.name),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return CascadeControl(patcher)
