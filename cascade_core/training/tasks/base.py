"""What the loop asks of the thing that is trained, and what all of them share: a Stage C that predicts noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion import loss_weights
from ...networks.stage_c import StageC
from ..data.batches import Batch
from ..losses import diffusion_loss
from ..settings import ObjectiveSettings
from .conditions import CachedText, Conditions
from .trainable_text import TrainableText

State = Mapping[str, Tensor]  # of the trained module, or of its average

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}  # of files, as settings name them


@dataclass(frozen=True)
class Inputs:
    """A batch on the accelerator. latents: (B, 16, h, w) float32; hint: (B, C, H, W); image_prompts: (B, n, E)"""

    latents: Tensor
    caption_ids: Tensor
    text: tuple[Tensor, Tensor] | None = None  # states, pooled
    hint: Tensor | None = None
    image_prompts: Tensor | None = None

    def enter(self, stream: torch.cuda.Stream, made: torch.cuda.Event) -> None:
        """For use in a stream other than the one they were made in."""
        stream.wait_event(made)
        for value in (self.latents, *(self.text or ()), self.hint, self.image_prompts):
            if value is not None:
                value.record_stream(stream)  # or its memory would be given away while it is read


class Task:
    """Base of the four.

    trained    what the optimiser changes, in float32
    stage_c    the network, on its device
    text       captions' states, cached
    live       where they come from instead, if they are to be computed in each step
    dtype      what Stage C computes in
    """

    trained: nn.Module
    with_images = False
    live: TrainableText | None = None

    def __init__(self, stage_c: StageC, text: CachedText, objective: ObjectiveSettings, dtype: torch.dtype):
        self.stage_c, self.text, self.objective, self.dtype = stage_c, text, objective, dtype
        self.device = next(stage_c.parameters()).device
        self.weight = _loss_weight(objective).to(self.device)

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; `share` is of the learning rate."""
        return [{"params": [p for p in self.trained.parameters() if p.requires_grad]}]

    def prepare(self, batch: Batch, generator: torch.Generator) -> Inputs:
        """A batch brought to the accelerator; runs in a thread of its own, ahead of the step."""
        return self.inputs(batch)

    def inputs(self, batch: Batch, hint: Tensor | None = None) -> Inputs:
        prompts = batch.image_prompts
        return Inputs(
            batch.latents.to(self.device),
            batch.caption_ids,
            self.cached_text(batch),
            hint,
            prompts.to(self.device) if prompts is not None else None,
        )

    def cached_text(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        return None if self.live else self.text(batch.caption_ids)

    def text_of(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if self.live is not None:
            return self.live(inputs.caption_ids)
        assert inputs.text is not None
        return inputs.text

    def loss(self, inputs: Inputs) -> dict[str, Tensor]:
        """The terms by name; `loss` is minimised."""
        raise NotImplementedError

    def record(self) -> None:
        """From now on the networks' passes are replayed from CUDA graphs, where they are the same in each step."""

    def using(self, state: State) -> AbstractContextManager[Callable[..., Tensor]]:
        """Inside the block: Stage C as it is with this state, for samples."""
        raise NotImplementedError

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        """The file that the run is for."""
        raise NotImplementedError

    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text states of prompts, inside a block of `using`; they must be among those that were cached."""
        return self.text.of(prompts) if self.live is None else self.live.of(prompts)

    def conditions(self, text: tuple[Tensor, Tensor], image_prompts: Tensor | None = None) -> Conditions:
        return Conditions.of(*text, self.stage_c.config.c_clip_img, self.dtype, image_prompts)

    def diffusion_loss(self, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor) -> dict[str, Tensor]:
        o = self.objective
        return diffusion_loss(predict, x0, o.max_loss_weight, o.pure_noise_share, self.weight, o.shift)

    def buffers(self) -> dict[str, Tensor]:
        """What else must be kept for resuming: the adaptive weight's buckets."""
        return dict(self.weight.state_dict())


class _Weight(nn.Module):
    """A loss weight without state, as a module."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, log_snr: Tensor, shift: float = 1.0) -> Tensor:
        return self.function(log_snr, shift=shift)


def _loss_weight(objective: ObjectiveSettings) -> nn.Module:
    if objective.loss_weight == "adaptive":
        return loss_weights.AdaptiveLossWeight()
    return _Weight(getattr(loss_weights, objective.loss_weight))
