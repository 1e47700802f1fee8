"""Sample pictures of a run's progress: the same prompts and noise each time, side by side."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..diffusion.guidance import Guider
from ..diffusion.samplers import SamplerStep
from ..errors import Interrupted
from ..geometry import stage_b_size, stage_c_size
from ..networks.previewer import Previewer
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from ..run import SamplingRun, by_log_snr, sample
from ..writing import replacing
from .settings import OutputSettings, SamplePrompt
from .tasks.base import State
from .tasks.conditions import Conditions
from .tasks.stage_c import StageCTask

STAGE_B_STEPS, STAGE_B_CFG = 10, 1.1  # published


class PromptLatent(NamedTuple):
    """Stage C's latent of a prompt. pooled: of the prompt and the negative one, (1, P) each"""

    prompt: SamplePrompt
    latent: Tensor  # (1, 16, h, w)
    pooled: tuple[Tensor, Tensor]


class Decoder(Protocol):
    def __call__(self, sampled: PromptLatent, ask: Callable[[SamplerStep], None]) -> Tensor:
        """Decodes to a picture (3, H, W), about [0, 1]. ask: called at each step, raises Interrupted."""
        ...


class PreviewDecoder:
    """The previewer: a small picture, fast."""

    def __init__(self, previewer: Previewer):
        self.previewer = previewer

    def __call__(self, sampled: PromptLatent, ask: Callable[[SamplerStep], None]) -> Tensor:
        return self.previewer(sampled.latent)[0]


class CascadeDecoder:
    """Stage B and Stage A: the picture itself. They are on the device only while they are used, else in main memory."""

    def __init__(self, stage_b: StageB, stage_a: StageA, device: torch.device, dtype: torch.dtype):
        self.stage_b, self.stage_a, self.device, self.dtype = stage_b, stage_a, device, dtype

    def __call__(self, sampled: PromptLatent, ask: Callable[[SamplerStep], None]) -> Tensor:
        channels = self.stage_b.config.c_in
        with _on(self.stage_b, self.device):
            latent = sample_stage_b(self.stage_b, sampled, channels, self.dtype, ask)
        with _on(self.stage_a, self.device):
            return self.stage_a.decode(latent)[0]


@contextmanager
def _on(network: nn.Module, device: torch.device) -> Iterator[None]:
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")


class Samples:
    """Sample pictures of a state, by Stage C and a decoder.

    prompts  with all values filled in
    hints    (N, C, H, W) of a ControlNet, one for each prompt, and their latents' size
    stop     called at each step; True raises Interrupted
    stage_c  given if it is not the task's network
    """

    def __init__(
        self,
        task: StageCTask,
        output: OutputSettings,
        prompts: Sequence[SamplePrompt],
        decode: Decoder,
        hints: tuple[Tensor, tuple[int, int]] | None = None,
        stop: Callable[[], bool] = lambda: False,
        stage_c: StageC | None = None,
    ):
        self.task, self.output, self.prompts, self.decode = task, output, prompts, decode
        self.hints, self.stop = hints, stop
        self.config = (stage_c or task.stage_c).config

    @torch.no_grad()
    def __call__(self, step: int, state: State) -> Tensor:
        """All prompts' pictures as one: (3, H, W) in [0, 1] on the CPU"""
        with self.task.using(state) as network:
            sampled = self.latents(network)
        return grid([self.decode(each, self.ask).float().clamp(0, 1).cpu() for each in sampled])

    def latents(self, network: Callable[..., Tensor]) -> list[PromptLatent]:
        """Each prompt's latent by a Stage C."""
        return [self._sample(network, i, prompt) for i, prompt in enumerate(self.prompts)]

    def _sample(self, network: Callable[..., Tensor], index: int, prompt: SamplePrompt) -> PromptLatent:
        task, config = self.task, self.config
        width, height = _size(prompt)
        more, positions = {}, stage_c_size(height, width)
        if self.hints is not None:
            more, positions = {"hint": self.hints[0][index : index + 1]}, self.hints[1]
        latent = torch.zeros(1, config.c_in, *positions, device=task.device)
        run = SamplingRun(
            latent,
            prompt.seed or 0,
            prompt.steps or self.output.sample_steps,
            self.output.sample_shift,
            self.output.sample_sampler,
        )
        texts = [task.prompts([text]) for text in (prompt.prompt, prompt.negative)]
        sides = [{**Conditions.of(*text, config.c_clip_img, task.dtype)._asdict(), **more} for text in texts]
        cfg = self.output.sample_cfg if prompt.cfg is None else prompt.cfg
        guider = Guider(network, *sides, cfg=cfg, dtype=task.dtype)
        (_, positive), (_, negative) = texts
        return PromptLatent(prompt, sample(run, by_log_snr(guider), self.ask), (positive, negative))

    def ask(self, step: SamplerStep) -> None:
        if self.stop():
            raise Interrupted("The run was stopped.")


class StageBSamples:
    """Samples by a Stage B in training: Stage C samples the prompts once, before the first step, and is then freed."""

    @torch.no_grad()
    def __init__(
        self,
        task: StageCTask,
        stage_c: StageC,
        output: OutputSettings,
        prompts: Sequence[SamplePrompt],
        stage_a: StageA,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.task, self.stage_a = task, stage_a
        self.samples = Samples(task, output, prompts, self._decode, stop=stop, stage_c=stage_c)
        self.network: Callable[..., Tensor] | None = None
        self.sampled = self.samples.latents(stage_c)

    @torch.no_grad()
    def __call__(self, step: int, state: State) -> Tensor:
        """All prompts' pictures as one: (3, H, W) in [0, 1] on the CPU"""
        with self.task.using(state) as self.network:
            pictures = [self._decode(each, self.samples.ask) for each in self.sampled]
        return grid([picture.float().clamp(0, 1).cpu() for picture in pictures])

    def _decode(self, sampled: PromptLatent, ask: Callable[[SamplerStep], None]) -> Tensor:
        assert self.network is not None
        latent = sample_stage_b(self.network, sampled, self.stage_a.config.c_latent, self.task.dtype, ask)
        with _on(self.stage_a, self.task.device):
            return self.stage_a.decode(latent)[0]


def sample_stage_b(
    network: Callable[..., Tensor],
    sampled: PromptLatent,
    channels: int,
    dtype: torch.dtype,
    ask: Callable[[SamplerStep], None],
) -> Tensor:
    """Stage A's latent (1, C, h, w) from Stage C's latent of a prompt."""
    width, height = _size(sampled.prompt)
    start = torch.zeros(1, channels, *stage_b_size(height, width), device=sampled.latent.device)
    run = SamplingRun(start, sampled.prompt.seed or 0, STAGE_B_STEPS)
    effnet = sampled.latent.to(dtype)
    sides = [{"clip": pooled[:, None].to(dtype), "effnet": effnet} for pooled in sampled.pooled]
    guider = Guider(network, *sides, cfg=STAGE_B_CFG, dtype=dtype)
    return sample(run, by_log_snr(guider), ask)


def _size(prompt: SamplePrompt) -> tuple[int, int]:
    """(width, height) in pixels"""
    assert prompt.size is not None
    return prompt.size[0], prompt.size[-1]


def grid(pictures: Sequence[Tensor], gap: int = 4) -> Tensor:
    """(3, H, W) each, which may differ in size -> (3, …), about as many rows as columns, on white"""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    page = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        page[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return page


def write_picture(path: Path, picture: Tensor) -> None:
    """(3, H, W) in [0, 1] as PNG, whole or not at all."""
    from PIL import Image

    pixels = (picture * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
