# pyright: reportMissingImports=false
"""CONTROL_NET in ComfyUI: its ControlBase around a ControlNet of ours.

The host passes residuals as a list that Stage C pops from its end, one for each of its residual blocks. Where several
ControlNets drive different blocks, their lists are merged here by block number.
"""

from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.ldm.cascade.controlnet
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ....cascade_core import checkpoints
from ....cascade_core.errors import CascadeError
from ....cascade_core.hints import control as controlnets
from ....cascade_core.networks import activations
from ..control import ControlNetDescription
from .hosted import WholeLayers


class HostedControl(nn.Module):
    """Wrapper that computes in the precision of the network's weights and returns float32."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network: Any = network
        self.name = name

    def forward(self, hint: Tensor) -> list[Tensor | None]:
        weight = next(self.network.parameters())
        residuals = self.network(hint.to(weight.dtype))
        return [None if residual is None else residual.float() for residual in residuals]


class CascadeControl(comfy.controlnet.ControlBase):
    """ControlNet of ours with its hint, strength and range of steps, as the host's apply nodes set them."""

    def __init__(self, patcher: Any):
        super().__init__()
        self.patcher = patcher
        self.blocks = 0  # residual blocks of the MODEL that is being sampled
        self.residuals: controlnets.Residuals | None = None
        self.size: tuple[int, int] | None = None  # of the latent that the residuals belong to

    @property
    def control(self) -> HostedControl:
        """Network with the name of its file."""
        return self.patcher.model

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Raises CascadeError before the first step for a MODEL that cannot take this network's residuals."""
        super().pre_run(model, percent_to_timestep_function)
        if not isinstance(model, comfy.model_base.StableCascade_C):
            raise CascadeError(
                f"{self.control.name} is a Stable Cascade ControlNet, but the MODEL is a "
                f"{type(model).__name__}; connect Stage C, or another ControlNet."
            )
        widths = controlnets.residual_blocks(model.diffusion_model)
        self.blocks = len(widths)
        controlnets.check_blocks(self.control.network.config, self.control.name, widths)

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
        if self.timestep_range is not None and not controlnets.is_on(t[0], *self.timestep_range):
            return before
        merged: controlnets.Residuals = list(reversed(before["input"])) if before else []
        merged += [None] * (self.blocks - len(merged))
        own_residuals = [
            None
            if residual is None
            else controlnets.for_batch(residual, len(x_noisy), batched_number).to(x_noisy.dtype)
            for residual in self._residuals(x_noisy)
        ]
        controlnets.add_residuals(merged, own_residuals, self.strength)
        return {"input": merged[::-1], "middle": [], "output": []}

    def _residuals(self, x_noisy: Tensor) -> controlnets.Residuals:
        """Residuals of the hint's images, computed once for each size of latent."""
        size = (x_noisy.shape[-2], x_noisy.shape[-1])
        residuals = self.residuals
        if residuals is None or self.size != size:
            config, hint = self.control.network.config, self.cond_hint_original
            controlnets.check_hint(config, self.control.name, hint.shape[1])
            residuals = self.control(controlnets.fit_hint(hint, config, size).to(x_noisy.device))
            self.residuals, self.size = residuals, size
        return residuals

    def copy(self) -> "CascadeControl":
        """Copies the settings, as the host's apply nodes do for each use; the weights are shared."""
        copied = CascadeControl(self.patcher)
        self.copy_to(copied)
        return copied

    def get_models(self) -> list[Any]:
        """Patchers that the host's memory manager must load for a run."""
        return [*super().get_models(), self.patcher]

    def get_models_only_self(self) -> list[Any]:
        """Patcher of this ControlNet, without the earlier ones."""
        return [self.patcher]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes of working memory for the residuals, in float32."""
        batch, _, height, width = self.cond_hint_original.shape
        values = activations.controlnet(self.control.network.config, batch, height, width)
        return 4 * values + super().inference_memory_requirements(dtype)

    def cleanup(self) -> None:
        """Drops the residuals after a run."""
        super().cleanup()
        self.residuals = self.size = None


def load_controlnet(path: Path) -> CascadeControl:
    network, _, _ = checkpoints.load_model(
        path, expect="controlnet", dtype=torch.float32, operations=WholeLayers(comfy.ops.manual_cast)
    )
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(
        HostedControl(network, path.name),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return CascadeControl(patcher)


def apply_controlnet(
    positive: list, negative: list, control_net: Any, hint: Tensor, strength: float, start: float, end: float
) -> tuple[list, list]:
    """Applies a ControlNet as the host's own node does: each prompt's earlier ControlNets stay chained before it."""
    chained: dict[Any, Any] = {}  # the prompts that share their earlier ControlNets share this one as well

    def applied(conditioning: list) -> list:
        prompts = []
        for tokens, values in conditioning:
            before = values.get("control")
            if before not in chained:
                chained[before] = control_net.copy().set_cond_hint(
                    hint.movedim(-1, 1), strength, (start, end)
                )
                chained[before].set_previous_controlnet(before)
            control_values = {"control": chained[before], "control_apply_to_uncond": False}
            prompts.append([tokens, {**values, **control_values}])
        return prompts

    return applied(positive), applied(negative)


def describe_controlnet(control_net: Any) -> ControlNetDescription:
    """Describes our ControlNets, the host's own for Cascade, and other models' by their class."""
    if isinstance(control_net, CascadeControl):
        return ControlNetDescription(control_net.control.name, True, control_net.control.network.config)
    # The host holds its own ControlNets for Cascade in the class of T2I adapters.
    network = getattr(control_net, "t2i_model", None)
    cascade = isinstance(network, comfy.ldm.cascade.controlnet.ControlNet)
    return ControlNetDescription(f"a {type(control_net).__name__}", cascade, None)
