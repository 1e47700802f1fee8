"""Launches of kernels, and compiling them ahead of their first: all that a forward needs at once, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import triton

_ahead: ContextVar[bool] = ContextVar("compiling_ahead", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`launch(kernel, grid)(…)` is `kernel[grid](…)`; within `compiling_ahead` it only compiles the kernel."""
    return partial(kernel.warmup, grid=grid) if _ahead.get() else kernel[grid]


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within, `launch` compiles for the arguments that it is given, and leaves results as they are: any numbers.

    At the end all is compiled. One kernel takes the compiler a second or so, mostly outside Python.
    """
    if not hasattr(triton, "AsyncCompileMode"):  # before Triton 3.5: each at its first launch
        yield
        return
    token = _ahead.set(True)
    try:
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _ahead.reset(token)
