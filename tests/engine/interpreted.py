"""Triton's interpreter for this process: to be imported before anything imports Triton.

Kernels are interpreted where TRITON_INTERPRET was set when they, and Triton itself, were imported. The variable is
taken back afterwards, so that no process that a test starts inherits it.
"""

import importlib
import os
import sys
from typing import Any

import numpy as np

assert "triton" not in sys.modules, "Triton was imported before tests/engine/interpreted.py."
os.environ["TRITON_INTERPRET"] = "1"
triton = importlib.import_module("triton")
interpreter: Any = importlib.import_module("triton.runtime.interpreter")
del os.environ["TRITON_INTERPRET"]
triton.knobs.runtime.interpret = True

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope) -> None:
    """Triton 3.7 asks NumPy for the int of an array (1,) where a loop ends, which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self, a, b, d, *_):
    """Triton 3.7 multiplies bfloat16 as the integers that NumPy holds them as."""
    a, b = (_float32(factor.data) if factor.dtype.is_bf16() else factor.data for factor in (a, b))
    return interpreter.TensorHandle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.create_dot = _dot
