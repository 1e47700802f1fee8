"""Previews of a run: how large, in what order with the run's own work, and how near a card is followed."""

from collections.abc import Callable
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade_nodes.nodes.hosts import previews
from cascade_nodes.nodes.hosts.previews import AHEAD, ColourFactors, Launched, Pace, Previewer, Previews


class Enlarge(nn.Module):
    """Eight pixels a side for each position, of its first three channels."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, latent: Tensor) -> Tensor:
        self.sizes.append(tuple(latent.shape))
        return latent[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) * self.weight


class Card:
    """A card that does its work when it is told to, in order."""

    def __init__(self):
        self.work: list[Callable[[], None]] = []
        self.done = 0

    def launch(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Launched:
        picture = torch.empty(0, dtype=torch.uint8)
        launched = Launched(picture, Passed(self, len(self.work)))

        def run() -> None:
            result = work(x)
            picture.resize_(result.shape).copy_(result)

        self.work.append(run)
        return launched

    def finish(self) -> None:
        for run in self.work[self.done :]:
            run()
        self.done = len(self.work)


class Passed:
    """Point in a card's work, that of the given index."""

    def __init__(self, card: Card, index: int):
        self.card, self.index = card, index

    def query(self) -> bool:
        return self.card.done > self.index


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(previews, "monotonic", lambda: seconds[0])
    return seconds


def grey(level: float, batch: int = 1, height: int = 2, width: int = 3) -> Tensor:
    return torch.full((batch, 4, height, width), level)


def level_of(picture: Image.Image | None) -> float:
    assert picture is not None
    return round(float(np.asarray(picture).mean()) / 255, 2)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((2, 3), (24, 16)),
        ((32, 32), (256, 256)),
        ((96, 48), (128, 256)),
        ((2048, 1), (8, 256)),
        ((1, 384), (256, 8)),
    ],
)
def test_it_costs_no_more_for_a_large_picture(size, shown):
    network = Enlarge()
    picture = Previews(Previewer(network, 8, 256)).after_step(grey(0.5, 1, *size))
    assert picture is not None
    assert picture.size == shown  # (width, height)
    assert level_of(picture) == 0.5
    assert max(network.sizes[0]) <= 32


def test_colour_factors():
    factors = ColourFactors([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]], [0.0, 0.0, 0.5])
    picture = Previewer(factors, 1, 512).picture(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
    assert picture.tolist() == [[[255, 64, 191]]]
    assert picture.dtype == torch.uint8


def test_the_first_of_a_batch_in_any_precision():
    batch = torch.cat([grey(0.25), grey(0.75)]).to(torch.bfloat16)
    assert level_of(Previews(Previewer(Enlarge(), 8, 256)).after_step(batch)) == 0.25


def test_numbers_that_are_none_are_shown():
    assert Previews(Previewer(Enlarge(), 8, 256)).after_step(grey(torch.nan)) is not None


def test_a_card_shows_a_step_though_the_run_goes_on(now):
    """The latent is overwritten before the card comes to it; nothing waits for the picture, and it comes once."""
    card = Card()
    shown = Previews(Previewer(Enlarge(), 8, 256), card)
    x0 = grey(0.25)
    assert shown.after_step(x0) is None
    x0.fill_(0.75)
    now[0] = 1.0
    assert shown.after_step(x0) is None  # the card is not there yet: no second one is launched
    assert len(card.work) == 1
    card.finish()
    now[0] = 1.1
    assert level_of(shown.after_step(x0)) == 0.25
    assert shown.ready() is None
    assert len(card.work) == 2  # the next one is due
    card.finish()
    assert level_of(shown.ready()) == 0.75
    now[0] = 1.34
    assert shown.after_step(x0) is None
    assert len(card.work) == 2  # less than a quarter of a second after the last
    now[0] = 1.35
    assert shown.after_step(x0, last=True) is None
    assert len(card.work) == 2  # the run is over before it would come
    assert shown.after_step(x0) is None
    assert len(card.work) == 3


@pytest.mark.parametrize("place", ["launch", "query"])
def test_a_card_that_fails_is_not_asked_again(now, caplog, place):
    card = Card()
    shown = Previews(Previewer(Enlarge(), 8, 256), card)
    failure = Mock(side_effect=torch.OutOfMemoryError("out of\n memory"))
    with patch.object(Card if place == "launch" else Passed, place, failure):
        for now[0] in range(4):
            assert shown.after_step(grey(0.5)) is None
    assert failure.call_count == 1
    assert "This run shows no previews: OutOfMemoryError('out of\\n memory')" in caplog.text


def test_the_host_is_two_steps_ahead_of_a_card():
    """Its queue holds the step that it works on and a whole one after it."""
    card, pace = Card(), Pace()
    waits = []
    for step in range(6):
        pace.add_step(Passed(card, step))
        card.work.append(lambda: None)
        while not pace.caught_up():
            waits.append(step)
            card.done += 1  # the card works while the host waits
        assert len(card.work) - card.done <= AHEAD
    assert waits == [2, 3, 4, 5]


def test_a_fast_card_is_not_waited_for():
    card, pace = Card(), Pace()
    for step in range(6):
        pace.add_step(Passed(card, step))
        card.done = step + 1
        assert pace.caught_up()
