"""Kernels that give the same bits each time, so that a resumed run equals one that was never stopped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import CascadeError


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside the block, kernels that give the same bits each time."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a search for memory that is read before it is written
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise CascadeError(
            f"This computation has no form that gives the same bits each time ({str(error).split('.')[0]}); set "
            "train.deterministic to false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
