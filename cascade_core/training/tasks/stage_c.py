"""Common base of the four tasks: a Stage C or B that predicts noise, with its conditions.

Stage C's conditions are text, image prompts and hints; Stage B's are the pooled text and the compressor's latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...diffusion import loss_weights
from ...networks.stage_b import StageB
from ...networks.stage_c import StageC
from ..data.batches import Batch
from ..data.stage_b import StageBData
from ..losses import diffusion_loss
from ..settings import ObjectiveSettings
from .base import State, Task
from .conditions import CachedText, Conditions, StageBConditions
from .trainable_text import TrainableText


@dataclass(frozen=True)
class StageCInputs:
    """A batch on the accelerator. latents: (B, 16, h, w) float32; hint: (B, C, H, W); image_prompts: (B, n, E)

    For Stage B: latents (B, 4, h, w) of Stage A; effnet (B, 16, h', w'), the compressor's.
    """

    latents: Tensor
    caption_ids: Tensor  # (B,) int64, on the CPU
    text: tuple[Tensor, Tensor] | None = None  # states, pooled
    hint: Tensor | None = None
    image_prompts: Tensor | None = None
    weights: Tensor | None = None  # (B,), of each picture in the loss
    masks: Tensor | None = None  # (B, h, w), of each position
    effnet: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        more = self.hint, self.image_prompts, self.weights, self.masks, self.effnet
        values = (self.latents, *(self.text or ()), *more)
        return (value for value in values if value is not None)


class StageCTask(Task):
    """Base of the four tasks.

    network          Stage C or B, on its device
    text             the captions' cached states
    trainable_text   computes these states in each step instead, if the text encoder or tokens are trained
    dtype            precision of Stage C's computation
    """

    with_images = False
    trainable_text: TrainableText | None = None

    def __init__(
        self,
        network: StageC | StageB,
        text: CachedText,
        objective: ObjectiveSettings,
        dtype: torch.dtype,
        stage_b: StageBData | None = None,
    ):
        """stage_b: Stage B's training data."""
        self.network, self.text, self.objective, self.dtype = network, text, objective, dtype
        self.stage_b = stage_b
        self.scale_loss = dtype == torch.float16
        self.device = next(network.parameters()).device
        self.loss_weight = _loss_weight(objective).to(self.device)

    @property
    def kind(self) -> str:
        return "stage_b" if isinstance(self.network, StageB) else "stage_c"

    @property
    def stage_c(self) -> StageC:
        """The network of a task that has Stage C."""
        assert isinstance(self.network, StageC)
        return self.network

    def prepare(self, batch: Batch, generator: torch.Generator) -> StageCInputs:
        if self.stage_b is None:
            return self.inputs(batch)
        return self.prepare_stage_b(batch, *self.stage_b(batch, generator))

    def prepare_stage_b(self, batch: Batch, latents: Tensor, effnet: Tensor) -> StageCInputs:
        """A batch for Stage B. latents: Stage A's; effnet: the compressor's"""
        inputs = self.inputs(batch)
        masks = inputs.masks
        if masks is not None:  # at Stage C's positions
            masks = F.interpolate(masks[:, None], latents.shape[-2:])[:, 0]
        latents, effnet = latents.to(self.device), effnet.to(self.device)
        return replace(inputs, latents=latents, effnet=effnet, masks=masks)

    def inputs(self, batch: Batch, hint: Tensor | None = None) -> StageCInputs:
        prompts = batch.image_prompts
        return StageCInputs(
            batch.latents.to(self.device),
            batch.caption_ids,
            None if self.trainable_text else self.text(batch.caption_ids),
            hint,
            prompts.to(self.device) if prompts is not None else None,
            batch.weights.to(self.device) if batch.weights is not None else None,
            batch.masks.to(self.device) if batch.masks is not None else None,
        )

    def text_of(self, inputs: StageCInputs) -> tuple[Tensor, Tensor]:
        """The batch's text states (B, T, C) and pooled states (B, P)."""
        if self.trainable_text is not None:
            return self.trainable_text(inputs.caption_ids)
        assert inputs.text is not None
        return inputs.text

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def described(self) -> str:
        """The contents of the file that it writes, in words."""
        raise NotImplementedError

    def use_cuda_graphs(self) -> None:
        """Replays the networks' passes from CUDA graphs from now on, if they are the same in each step."""

    def using(self, state: State) -> AbstractContextManager[Callable[..., Tensor]]:
        """Context with the network in this state, for samples."""
        raise NotImplementedError

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the run's result."""
        raise NotImplementedError

    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text states of prompts, inside a block of `using`; they must be among those that were cached."""
        text = self.text if self.trainable_text is None else self.trainable_text
        return text.of(prompts)

    def conditions_of(
        self, inputs: StageCInputs, text: tuple[Tensor, Tensor] | None = None
    ) -> Conditions | StageBConditions:
        """The network's arguments after x and r. text: another than the batch's own"""
        states, pooled = text or self.text_of(inputs)
        if self.kind == "stage_c":
            return self.conditions((states, pooled), inputs.image_prompts)
        assert inputs.effnet is not None
        return StageBConditions(inputs.effnet.to(self.dtype), pooled.to(self.dtype)[:, None])

    def conditions(self, text: tuple[Tensor, Tensor], image_prompts: Tensor | None = None) -> Conditions:
        return Conditions.of(*text, self.stage_c.config.c_clip_img, self.dtype, image_prompts)

    def diffusion_loss(
        self, predict: Callable[[Tensor, Tensor], Tensor], inputs: StageCInputs
    ) -> dict[str, Tensor]:
        o = self.objective
        more = o.t_range, o.noise_offset, o.multires_noise, o.huber, inputs.weights, inputs.masks
        shares = o.max_loss_weight, o.pure_noise_share
        more += (self.stage_b is not None and self.stage_b.settings.pyramid_noise,)
        return diffusion_loss(predict, inputs.latents, *shares, self.loss_weight, o.shift, *more)

    def buffers(self) -> dict[str, Tensor]:
        """The adaptive loss weight's buckets."""
        return dict(self.loss_weight.state_dict())


class _StatelessWeight(nn.Module):
    """A loss weight without state, as a module."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, log_snr: Tensor, shift: float = 1.0) -> Tensor:
        return self.function(log_snr, shift=shift)


def _loss_weight(objective: ObjectiveSettings) -> nn.Module:
    if objective.loss_weight == "adaptive":
        return loss_weights.AdaptiveLossWeight()
    function = getattr(loss_weights, objective.loss_weight)
    if objective.loss_weight == "min_snr_gamma":
        function = partial(function, gamma=objective.snr_gamma)
    return _StatelessWeight(function)
