"""Finds the weight at fault where a network's output has NaN or infinity."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..checkpoints import first_non_finite
from ..errors import CascadeError

NON_FINITE_WEIGHT = "The weight {weight} holds NaN or infinity; download the file again."


class Stage(Protocol):
    """Loaded networks whose file names are known."""

    def networks(self) -> list[tuple[nn.Module, str]]:
        """Each network with the name of its file, and what it is."""
        ...


def non_finite_weight(stage: Stage) -> str | None:
    """The first weight that holds NaN or infinity, with its file, or None. Reads every weight."""
    for network, file in stage.networks():
        weight = first_non_finite(network)
        if weight is not None:
            return f"{weight} of {file}"
    return None


@contextmanager
def naming_non_finite(stage: Stage) -> Iterator[None]:
    """Adds the file's name where an encoder of the core, which does not know it, refuses NaN."""
    try:
        yield
    except CascadeError:
        weight = non_finite_weight(stage)
        if weight is None:
            raise
        raise CascadeError(NON_FINITE_WEIGHT.format(weight=weight)) from None


def check_finite_output(
    tensors: Iterable[Tensor | None],
    find_weight: Callable[[], str | None],
    subject: str,
    advice: str = "load it in bf16 or fp32",
) -> None:
    """Raises CascadeError where an output holds NaN or infinity.

    Names the weight at fault, found by find_weight(), or gives `advice` where every weight is finite.
    """
    if all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return
    weight = find_weight()
    if weight is not None:
        raise CascadeError(NON_FINITE_WEIGHT.format(weight=weight))
    raise CascadeError(f"{subject} holds NaN or infinity, though none of the weights does; {advice}.")


def check_stage_finite(tensors: Iterable[Tensor], stage: Stage, subject: str, *advice: str) -> None:
    """Raises CascadeError where a stage's output holds NaN or infinity (`check_finite_output`)."""
    check_finite_output(tensors, lambda: non_finite_weight(stage), subject, *advice)
