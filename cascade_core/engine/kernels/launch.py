"""Launches of kernels, and compiling them ahead of their first: all that a forward needs at once, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import triton
from torch import Tensor

_compiled: ContextVar[set[Hashable] | None] = ContextVar("compiled_ahead", default=None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`launch(kernel, grid)(…)` is `kernel[grid](…)`; within `compile_ahead` it only compiles the kernel."""
    compiled = _compiled.get()
    if compiled is None:
        return kernel[grid]

    def compile_once(*arguments: Any, **options: Any) -> None:
        values = (*arguments, *options.values())
        # The compiler would ask its cache for each of a thousand launches, which takes a second.
        key = kernel, *options, *map(_kind, values)
        if key not in compiled:
            compiled.add(key)
            kernel.warmup(*arguments, grid=grid, **options)

    return compile_once


def _kind(value: Any) -> Hashable:
    """What a kernel may be compiled anew for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        return value.base.dtype, tuple(value.block_shape)
    return value


def described(matrix: Tensor, rows: int, columns: int) -> Any:
    """For the tensor memory accelerator, tile by tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def compile_ahead(forward: Callable[[], object]) -> None:
    """Compiles all that `forward` launches, and leaves results as they are: it computes any numbers.

    One kernel takes the compiler a second or so, mostly outside Python.
    """
    if hasattr(triton, "AsyncCompileMode"):  # since Triton 3.5; before, each is compiled at its first launch
        copy_context().run(_compile, forward)  # whatever comes of it, nothing stays switched on


def _compile(forward: Callable[[], object]) -> None:
    _compiled.set(set())
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        forward()
