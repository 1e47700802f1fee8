"""Previews of a sampling run that never delay it: few, small, and on a card computed beside it.

They are launched and fetched between two steps, in the sampling thread, so that none allocates during the capture of
a CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from ...cascade_core.accelerators import side_stream
from ...cascade_core.errors import quoted

INTERVAL = 0.25  # seconds from one preview to the next, at least
PAUSE = 10  # interval in durations of the last preview, where a run waits for them
AHEAD = 2  # steps that the host may be ahead of a card


class Event(Protocol):
    """Point in the work of a device."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...


class ColourFactors(nn.Module):
    """Each position's channels times factors for red, green and blue.  (1, C, h, w) -> (1, 3, h, w), about [0, 1]

    factors (C, 3) and bias (3,) or None map a latent to [-1, 1].
    """

    def __init__(self, factors: Sequence[Sequence[float]], bias: Sequence[float] | None = None):
        super().__init__()
        weight = torch.tensor(factors).T[:, :, None, None] / 2
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter((torch.tensor(bias or [0.0] * 3) + 1) / 2, requires_grad=False)

    def forward(self, latent: Tensor) -> Tensor:
        return conv2d(latent, self.weight, self.bias)


class Previewer:
    """Small pictures of clean latents.

    network  (1, C, h, w) -> (1, 3, stride·h, stride·w) in [0, 1], or has a `decode` that does so
    side     pixels of a picture's longer side, at most: a larger latent is averaged first
    """

    def __init__(self, network: nn.Module, stride: int, side: int):
        self.network = network
        self.positions = max(side // stride, 1)
        self._side_stream: SideStream | None = None

    def side_stream(self, device: torch.device) -> SideStream | None:
        """The stream for previews on a card: always the same one, since libraries keep memory for each stream."""
        if device.type != "cuda":
            return None
        if self._side_stream is None or self._side_stream.device != device:
            self._side_stream = SideStream(device)
        return self._side_stream

    @torch.inference_mode()
    def picture(self, latent: Tensor) -> Tensor:
        """latent: (1, C, h, w) -> (H, W, 3) uint8, on its device"""
        share = self.positions / max(latent.shape[-2:])
        if share < 1:
            size = [max(round(side * share), 1) for side in latent.shape[-2:]]
            latent = interpolate(latent, size, mode="area")
        decode = getattr(self.network, "decode", self.network)
        picture = decode(latent.to(next(self.network.parameters()))).clamp(0, 1)[0]  # (3, H, W)
        return (picture * 255).round().byte().movedim(0, -1).contiguous()


@dataclass(frozen=True)
class Launched:
    """A picture being copied to main memory."""

    picture: Tensor
    arrived: Event


class Launcher(Protocol):
    """Launches work that a run does not wait for."""

    def launch(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Launched:
        """Launches work(x) after all earlier launches; nobody else uses x."""
        ...


class SideStream:
    """CUDA stream beside the sampling stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = side_stream(device)

    def launch(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Launched:
        """Launches work(x) after all work launched on the current stream so far, without delaying that stream."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # x may be freed at once; its memory is only reused after the work is done.
        x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            result = work(x)
            # A copy to pageable memory would make the host wait for all earlier steps.
            copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            copy.copy_(result, non_blocking=True)
            return Launched(copy, self.stream.record_event())


class Previews:
    """Previews of one run.

    previewer    None: no previews
    side_stream  computes them; None: they are computed at once, during the run
    """

    def __init__(self, previewer: Previewer | None, side_stream: Launcher | None = None):
        self._previewer, self._side_stream = previewer, side_stream
        self._launched: Launched | None = None
        self._due = -math.inf

    def after_step(self, x0: Tensor, last: bool = False) -> Image.Image | None:
        """Takes a step's clean latent (B, C, h, w), to preview its first image; returns a picture if one is ready.

        On a card, the last step's picture would be ready too late, so it is not made.
        """
        shown = self.ready()
        if (
            self._previewer is None
            or self._launched
            or monotonic() < self._due
            or (last and self._side_stream)
        ):
            return shown
        try:
            return self._begin(self._previewer, x0) or shown
        except Exception as error:
            return self._give_up(error)

    def ready(self) -> Image.Image | None:
        """The picture that has become ready since the last call, or None."""
        try:
            if self._launched is None or not self._launched.arrived.query():
                return None
            launched, self._launched = self._launched, None
            return Image.fromarray(launched.picture.numpy())
        except Exception as error:
            return self._give_up(error)

    def _begin(self, previewer: Previewer, x0: Tensor) -> Image.Image | None:
        start = monotonic()
        latent = x0[:1].to(torch.float32, copy=True)  # copied in the run's stream: it may overwrite x0 later
        if self._side_stream is not None:
            self._launched = self._side_stream.launch(previewer.picture, latent)
            self._due = start + INTERVAL
            return None
        picture = Image.fromarray(previewer.picture(latent).cpu().numpy())
        self._due = start + max(INTERVAL, PAUSE * (monotonic() - start))
        return picture

    def _give_up(self, error: Exception) -> None:
        """Goes on without previews, since they must not make a run fail."""
        logging.getLogger(__name__).warning("This run shows no previews: %s", quoted(error))
        self._previewer = self._launched = None


class Pace:
    """Keeps the host at most AHEAD steps ahead of a card, without letting the card's queue run empty.

    Otherwise the host would launch all steps in a moment: the bar would be at its end, no preview could be shown, and
    no interruption take effect, while the card still works through the run.
    """

    def __init__(self) -> None:
        self._steps: deque[Event] = deque()

    def add_step(self, event: Event) -> None:
        """Records a step that ends at this event."""
        self._steps.append(event)

    def caught_up(self) -> bool:
        """Whether the card has caught up enough to launch the next step."""
        while len(self._steps) > AHEAD and self._steps[0].query():
            self._steps.popleft()
        return len(self._steps) <= AHEAD
