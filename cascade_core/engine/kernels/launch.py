"""Kernel launches, and ahead-of-time compilation of all kernels of a forward at once, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import triton
from torch import Tensor

from ..collector import collector_paused

_compiled: ContextVar[set[Hashable] | None] = ContextVar("compiled_ahead", default=None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`launch(kernel, grid)(…)` is `kernel[grid](…)`, but inside `compile_ahead` it only compiles the kernel."""
    compiled = _compiled.get()
    if compiled is None:
        return kernel[grid]

    def compile_once(*arguments: Any, **options: Any) -> None:
        values = (*arguments, *options.values())
        # Without this set, the compiler would search its own cache for each of a thousand launches, which takes a
        # second.
        key = kernel, *options, *map(_specialisation, values)
        if key not in compiled:
            compiled.add(key)
            kernel.warmup(*arguments, grid=grid, **options)

    return compile_once


def _specialisation(value: Any) -> Hashable:
    """The property of an argument that selects a compiled kernel."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        return value.base.dtype, tuple(value.block_shape)
    return value


def tensor_descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """The matrix as the tensor memory accelerator (TMA) loads it, in tiles of rows × columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def compile_ahead(forward: Callable[[], object]) -> None:
    """Compiles every kernel that `forward` launches, in parallel. Its kernels do not run: its result is meaningless.

    The compiler needs about a second per kernel, mostly outside Python.
    """
    if _compiled.get() is not None:  # compiling already
        forward()
    elif hasattr(triton, "AsyncCompileMode"):
        # Since Triton 3.5; older versions compile each kernel at its first launch.
        copy_context().run(_compile, forward)  # the mode ends with the context, also after an error


def _compile(forward: Callable[[], object]) -> None:
    _compiled.set(set())
    # A host's heap takes the collector half a second, in which no thread compiles.
    with collector_paused(), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        forward()
