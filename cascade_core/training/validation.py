"""The error on held-out pictures, with the same noise each time and in every run."""

from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.forward_process import diffuse
from .data.batches import Batch, TrainingData
from .data.cache import key_of
from .data.stage_b import HeldOutStageB
from .settings import ValidationSettings
from .tasks.base import State
from .tasks.stage_c import StageCTask


class Validation:
    """The mean squared error of the predicted noise over all held-out pictures, at evenly spread times, unweighted.

    data: of the held-out pictures, by the settings of `as_they_are`, without image prompts. The noise of a picture
    depends on its name and the time alone, not on the run's seed or batches. stage_b: of the same pictures, for Stage B
    """

    def __init__(
        self,
        task: StageCTask,
        data: TrainingData,
        settings: ValidationSettings,
        batch_size: int,
        stage_b: HeldOutStageB | None = None,
    ):
        self.task, self.data, self.settings, self.batch_size = task, data, settings, batch_size
        self.stage_b = stage_b

    @torch.no_grad()
    def __call__(self, state: State) -> float:
        """The error of a network with this state."""
        errors = []
        with self.task.using(state) as network:
            for number in range(self.data.steps_per_epoch(self.batch_size)):
                batch = self.data.batch(number, self.batch_size)
                errors += [self._errors(network, batch, i) for i in range(self.settings.times)]
        return torch.cat(errors).mean().item()

    def _errors(self, network, batch: Batch, number: int) -> Tensor:
        """The errors (B,) at one of the times."""
        task, count = self.task, len(batch.keys)
        # The captions are looked up by text, as prompts are, since their ids are not those of the training captions.
        plain = replace(batch, caption_ids=torch.zeros(count, dtype=torch.int64))
        generator = torch.Generator().manual_seed(_seed("hint", *batch.keys))
        if self.stage_b is None:
            inputs = task.prepare(plain, generator)
        else:
            inputs = task.prepare_stage_b(plain, *self.stage_b(plain, generator))
        noise = torch.stack(
            [
                torch.randn(latent.shape, generator=torch.Generator().manual_seed(_seed(number, key)))
                for key, latent in zip(batch.keys, inputs.latents, strict=True)
            ]
        ).to(task.device)
        t = torch.full((count,), (number + 0.5) / self.settings.times)
        diffused = diffuse(inputs.latents, noise, t)
        conditions = task.conditions_of(inputs, task.prompts(batch.captions))._asdict()
        hint = {"hint": inputs.hint} if inputs.hint is not None else {}
        predicted = network(diffused.noised.to(task.dtype), diffused.noise_cond, **conditions, **hint)
        squares = (predicted.float() - diffused.target).square()
        if inputs.masks is not None:
            squares = squares * inputs.masks[:, None]
        return squares.mean(dim=(1, 2, 3))


def _seed(*parts: object) -> int:
    return int.from_bytes(key_of("validation", *parts)[:8], "big") >> 1
