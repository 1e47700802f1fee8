"""Pictures of what a run has learned so far: the same prompts and noise each time, side by side."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.guidance import Guider
from ..diffusion.samplers import SamplerStep
from ..errors import Interrupted
from ..run import SamplingRun, by_log_snr, sample
from ..writing import replacing
from .settings import OutputSettings
from .tasks.base import State
from .tasks.conditions import Conditions
from .tasks.stage_c import StageCTask

Decode = Callable[[Tensor], Tensor]  # Stage C's latents (N, 16, h, w) -> pictures (N, 3, H, W) in [0, 1]


class Samples:
    """size: of Stage C's latent; more: further arguments of what `Task.using` gives, a row for each prompt.

    stop: asked at each step; where it says so, Interrupted is raised.
    """

    def __init__(
        self,
        task: StageCTask,
        output: OutputSettings,
        size: tuple[int, int],
        decode: Decode,
        seed: int = 0,
        more: Mapping[str, Tensor] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.task, self.output, self.size, self.decode, self.seed = task, output, size, decode, seed
        self.more, self.stop = dict(more or {}), stop

    @torch.no_grad()
    def __call__(self, step: int, state: State) -> Tensor:
        """All prompts' pictures as one: (3, H, W) in [0, 1] on the CPU"""
        task, output = self.task, self.output
        latent = torch.zeros(len(output.prompts), task.stage_c.config.c_in, *self.size, device=task.device)
        run = SamplingRun(latent, self.seed, output.sample_steps, output.sample_shift, output.sample_sampler)
        with task.using(state) as network:
            sides = [
                {**Conditions.of(*text, task.stage_c.config.c_clip_img, task.dtype)._asdict(), **self.more}
                for text in (task.prompts(output.prompts), task.prompts([""]))
            ]
            guider = Guider(network, *sides, cfg=output.sample_cfg, dtype=task.dtype)
            latents = sample(run, by_log_snr(guider), self._ask)
        return grid(self.decode(latents).float().clamp(0, 1).cpu())

    def _ask(self, step: SamplerStep) -> None:
        if self.stop():
            raise Interrupted("The run was stopped.")


def grid(pictures: Tensor, gap: int = 4) -> Tensor:
    """(N, 3, H, W) -> (3, …), about as many rows as columns, on white"""
    count, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    page = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        page[:, top : top + height, left : left + width] = picture
    return page


def write_picture(path: Path, picture: Tensor) -> None:
    """(3, H, W) in [0, 1] as PNG, whole or not at all."""
    from PIL import Image

    pixels = (picture * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
