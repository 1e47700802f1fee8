"""Programmatic dependent launch (CUDA Programming Guide): a kernel is set up while the one before it still runs.

It needs compute capability 9 and Triton 3.4; elsewhere kernels are launched one after the other, as ever.
"""

from functools import cache

import torch
import triton
import triton.language as tl

enabled = True  # here for measurements: graphs that were recorded stay as they are


def early(device: torch.device) -> dict[str, bool]:
    """Options for the launch of a kernel that begins with `wait_for_previous(EARLY)`."""
    return {"EARLY": True, "launch_pdl": True} if enabled and _possible(device) else {"EARLY": False}


@cache
def _possible(device: torch.device) -> bool:
    known = hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Comes before all that a kernel reads or writes: only now are the results of the kernels before it there.

    Those before the previous one too, since that one has waited itself. The next kernel may be set up from here on.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
