"""Previews on a card: made beside the run, of the latents that it had, and the run is the same to the bit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.cascade_core.diffusion.samplers import Callback, SamplerStep
from cascade_nodes.cascade_core.engine import Engine
from cascade_nodes.cascade_core.networks.config import PreviewerConfig
from cascade_nodes.cascade_core.networks.previewer import Previewer as PreviewerNetwork
from cascade_nodes.nodes.hosts import previews
from cascade_nodes.nodes.hosts.previews import Pace, Previewer, Previews
from cascade_nodes.tests.core.sampling import sample_from
from cascade_nodes.tests.gpu.compared import SHALLOW_C, draw, inputs, network_of
from cascade_nodes.tests.gpu.conftest import Replays

STEPS, SHAPE = 12, (2, 16, 24, 24)

pytestmark = pytest.mark.usefixtures("exact_arithmetic")


@pytest.fixture
def previewer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Previewer:
    """A previewer with random weights, due at every step."""
    monkeypatch.setattr(previews, "INTERVAL", 0.0)
    torch.manual_seed(0)
    return Previewer(PreviewerNetwork(PreviewerConfig()).eval().requires_grad_(False).to(device), 8, 256)


@pytest.fixture
def run(device: torch.device) -> Any:
    """A run with guidance, by the engine."""
    network = network_of(SHALLOW_C, torch.bfloat16, device)
    (_, positive), (_, negative) = (inputs(SHALLOW_C, network, batch=2, seed=seed) for seed in range(2))
    guider, start = Guider(Engine(network), positive, negative, cfg=4.0), draw(SHAPE).to(device)

    @torch.inference_mode()
    def sampled(callback: Callback | None = None) -> Tensor:
        noise = NoiseSource(1, 2, SHAPE[1:]).draw
        return sample_from(
            guider, start, steps=STEPS, shift=2.0, sampler="ddpm", noise=noise, callback=callback
        )

    return sampled


class Viewer:
    """Follows a run as a host does. x0 is overwritten once it was shown, as a sampler may do."""

    def __init__(self, previewer: Previewer, device: torch.device):
        self.device, self.previews, self.pace = (
            device,
            Previews(previewer, previewer.side_stream(device)),
            Pace(),
        )
        self.latents: list[Tensor] = []
        self.pictures: list[np.ndarray] = []

    def __call__(self, step: SamplerStep) -> None:
        self.latents.append(step.x0.clone())
        self.keep(self.previews.after_step(step.x0, last=step.index + 1 == step.steps))
        step.x0.fill_(torch.nan)  # ddpm does not look at it again
        self.pace.add_step(torch.cuda.current_stream(self.device).record_event())
        while not self.pace.caught_up():
            time.sleep(1e-4)
            self.keep(self.previews.ready())

    def keep(self, picture: Image.Image | None) -> None:
        if picture is not None:
            self.pictures.append(np.asarray(picture))


def test_a_run_is_shown_beside_it(previewer: Previewer, run: Any, device: torch.device, replays: Replays):
    """Each preview is a step's own, to the bit; the run captures graphs meanwhile, and gives the bits of one unseen."""
    viewers = [Viewer(previewer, device) for _ in range(2)]
    run(viewers[0])
    assert replays.count > 0
    unseen = run()
    assert torch.equal(run(viewers[1]), unseen)
    assert unseen.isfinite().all()
    shown: list[int] = []
    for viewer in viewers:
        own = [previewer.picture(latent[:1]).cpu().numpy() for latent in viewer.latents]
        steps = [
            next(step for step, expected in enumerate(own) if np.array_equal(picture, expected))
            for picture in viewer.pictures
        ]
        assert steps == sorted(set(steps))
        shown += [step for step in steps if step < len(own) - 1]
    assert shown  # while the run was under way; how many, depends on what else the card does


def test_the_host_does_not_wait_for_a_preview(previewer: Previewer, device: torch.device):
    """The card has much to do first: beginning a preview takes no synchronisation, and it arrives later."""
    beside = Previews(previewer, previewer.side_stream(device))
    x0 = draw(SHAPE).to(device)
    beside.after_step(x0)  # compiles, loads
    torch.cuda.synchronize(device)
    assert beside.ready() is not None
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert beside.after_step(x0) is None
        assert beside.ready() is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    assert beside.ready() is not None
