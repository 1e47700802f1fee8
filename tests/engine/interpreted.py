"""Triton's interpreter for this process: to be imported before anything imports Triton.

Kernels are interpreted where TRITON_INTERPRET was set when they, and Triton itself, were imported. The variable is
taken back afterwards, so that no process that a test starts inherits it.
"""

import importlib
import os
import sys
from typing import Any

import numpy as np
import torch

assert "triton" not in sys.modules, "Triton was imported before tests/engine/interpreted.py."
os.environ["TRITON_INTERPRET"] = "1"
triton = importlib.import_module("triton")
interpreter: Any = importlib.import_module("triton.runtime.interpreter")
triton.knobs.runtime.interpret = True  # which sets the variable once more
del os.environ["TRITON_INTERPRET"]

FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}
_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope) -> None:
    """Triton 3.7 asks NumPy for the int of an array (1,) where a loop ends, which NumPy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert(values: np.ndarray, source, target, *_) -> np.ndarray:
    """Triton 3.7 cuts floats off; PyTorch rounds, as the hardware does. Both as the bits of the type."""
    source, target = FLOATS[source.name], FLOATS[target.name]
    values = np.ascontiguousarray(values).view(f"i{source.itemsize}")
    converted = torch.from_numpy(values).view(source).to(target)
    return converted.view(getattr(torch, f"int{8 * target.itemsize}")).numpy().view(f"u{target.itemsize}")


def _dot(self, a, b, d, *_):
    """Triton 3.7 multiplies bfloat16 as the integers that NumPy holds them as."""
    a, b = (
        _float32(factor) if factor.dtype.name in ("bf16", "fp8e4nv") else factor.data for factor in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _float32(factor) -> np.ndarray:
    return _convert(factor.data, factor.dtype, triton.language.float32).view(np.float32)


interpreter._convert_float = _convert
interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter.InterpreterBuilder.create_dot = _dot
