"""The card that kernels are chosen and compiled for: that of a CUDA device or, without one, a described card.

Tensors on the meta device stand for tensors on a described card. So the kernels of a forward can be compiled for any
card without having one: in the tests, and in the processes that compile ahead of the first picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from ..accelerators import is_nvidia

_described: ContextVar[Card | None] = ContextVar("described_card", default=None)


class Card(NamedTuple):
    """capability: compute capability, (9, 0) for an H100"""

    capability: tuple[int, int]
    name: str
    multiprocessors: int


def card_of(device: torch.device) -> Card | None:
    """The card on which kernels run for tensors of a device, or None where none do."""
    return _described.get() if device.type == "meta" else _card(device)


@contextmanager
def described(card: Card) -> Iterator[None]:
    """Context in which tensors on the meta device stand for tensors on this card."""
    token = _described.set(card)
    try:
        yield
    finally:
        _described.reset(token)


@cache
def _card(device: torch.device) -> Card | None:
    if not is_nvidia(device) or not find_spec("triton"):
        return None
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.name, properties.multi_processor_count)
