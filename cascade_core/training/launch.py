"""accelerate: the device, the processes and the exchange between them, and nothing else that it can be configured to.

Precision, accumulation, compilation and FSDP are the settings file's. What else `accelerate config` writes reaches a
process as an environment variable, and is refused here by name: obeyed by half, it would train something else.
"""

from __future__ import annotations

import os

import torch

from ..accelerators import has_bf16
from ..errors import CascadeError, quoted
from ..networks.precision import PRECISIONS
from .processes import Processes

SHARDED = {  # ways to divide a network among processes
    "ACCELERATE_USE_FSDP": "FSDP (fsdp_config)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (deepspeed_config)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (megatron_lm_config)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def build_accelerator(precision: str = "auto") -> Processes:
    """Raises CascadeError where accelerate is missing, or configured to do what training here does not.

    precision: `train.precision` of the settings, which a mixed_precision that is given must agree with.
    """
    _check_configuration()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise CascadeError(
            "Training runs on accelerate, which is not installed; run: pip install accelerate"
        ) from None
    accelerator = Accelerator(mixed_precision="no")
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise _refusal(kind, "launch one process for each GPU (distributed_type: MULTI_GPU)")
    asked, own = _choice("MIXED_PRECISION"), compute_dtype(precision, accelerator.device)
    if asked != "no" and PRECISIONS.get(asked) != own:
        computed = next(name for name, dtype in PRECISIONS.items() if dtype == own)
        raise _refusal(
            f"mixed_precision {quoted(asked)}",
            f"this run computes in {computed}: choose by train.precision in the settings file, and leave "
            "mixed_precision at no",
        )
    return Processes(accelerator)


def _check_configuration() -> None:
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise _refusal(
                name,
                "launch without it (distributed_type: MULTI_GPU); train.fsdp in the settings file divides a network",
            )
    if _choice("DYNAMO_BACKEND") != "no":
        raise _refusal(
            f"dynamo_backend {quoted(_choice('DYNAMO_BACKEND'))}",
            "set train.compile in the settings file instead, and leave it at no",
        )


def _choice(name: str) -> str:
    return os.environ.get(f"ACCELERATE_{name}", "").lower() or "no"


def _refusal(what: str, advice: str) -> CascadeError:
    return CascadeError(f"accelerate is configured for {what}, which training here does not use; {advice}.")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What networks compute in. auto: bf16 where the device computes in it, else fp16; float32 on the processor."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16(device) else torch.float16


def computing(precision: str, device: torch.device) -> dict[str, str]:
    """What a process computes on and in, which is the same for all of a run."""
    return {"train.precision": f"{compute_dtype(precision, device)} on {device.type}".removeprefix("torch.")}
