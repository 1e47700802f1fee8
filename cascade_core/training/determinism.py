"""Deterministic kernels, so that a resumed run equals, bit for bit, one that was never stopped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import CascadeError


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Chooses kernels that give the same bits each time, inside the block, if `enabled`."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that fills every new tensor
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise CascadeError(
            f"This operation has no deterministic implementation ({str(error).split('.')[0]}); set "
            "train.deterministic to false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
