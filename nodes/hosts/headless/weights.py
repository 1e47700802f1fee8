"""Which weight of a MODEL, CLIP, VAE or CLIP_VISION is at fault."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ....cascade_core import checkpoints
from ....cascade_core.errors import CascadeError
from ..run import NON_FINITE_WEIGHT


def first_non_finite(value: Any) -> str | None:
    for network, file in value.networks():
        weight = checkpoints.first_non_finite(network)
        if weight is not None:
            return f"{weight} of {file}"
    return None


@contextmanager
def naming_non_finite(value: Any) -> Iterator[None]:
    """The core's encoders refuse NaN themselves, but do not know their file; this names it."""
    try:
        yield
    except CascadeError:
        weight = first_non_finite(value)
        if weight is None:
            raise
        raise CascadeError(NON_FINITE_WEIGHT.format(weight=weight)) from None
