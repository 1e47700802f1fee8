"""accelerate supplies the device, the processes and their communication, and none of its other features.

Precision, accumulation, compilation and FSDP are set in the settings file. Other choices of `accelerate config` reach
a process as environment variables and are refused here by name, since obeying them in part would train something
else.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from ..accelerators import count, has_bf16
from ..errors import CascadeError, excerpt, on_one_line, printable, quoted
from ..networks.precision import PRECISIONS
from .processes import Processes

MEETING = timedelta(minutes=1)  # to tell the others why this process ends
SHARDED = {  # ways to divide a network among processes
    "ACCELERATE_USE_FSDP": "FSDP (fsdp_config)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (deepspeed_config)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (megatron_lm_config)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def launched_with_others() -> bool:
    """Whether this is one of several processes, by the variables that launchers set."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def share_failure(error: CascadeError) -> None:
    """Raises an error from before the run in the other processes, which else would wait for this one to meet them."""

    def fail() -> None:
        raise error

    with suppress(CascadeError):
        build_accelerator(patience=MEETING).on_each(fail)


def build_accelerator(precision: str = "auto", patience: timedelta | None = None) -> Processes:
    """Raises CascadeError where accelerate is missing, or configured for a feature that training here does not use.

    precision: `train.precision` of the settings, with which accelerate's mixed_precision, if given, must agree.
    patience: how long to wait for the other processes; None: as long as accelerate waits.
    """
    _check_configuration()
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise CascadeError(
            "Training runs on accelerate, which is not installed; run: pip install accelerate"
        ) from None
    several = launched_with_others()
    if several and "LOCAL_RANK" not in os.environ:
        raise CascadeError(
            f"WORLD_SIZE is {quoted(os.environ['WORLD_SIZE'])}, but nothing says which GPU is this process's "
            "(LOCAL_RANK), so that it would train alone; start the processes by torchrun or accelerate "
            "launch, or unset it."
        )
    # Where there is no accelerator, processes would each train alone as well.
    waiting: list[Any] = [InitProcessGroupKwargs(timeout=patience)] if patience is not None else []
    try:
        cpu = several and not (count("cuda") or count("xpu"))
        accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=waiting)
    except (
        torch.distributed.DistError,
        ValueError,
    ) as error:  # a taken port, others that do not come, no address
        unmet = isinstance(error, torch.distributed.DistError) or "MASTER_" in str(error)
        if not (several and unmet):
            raise
        where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        raise CascadeError(
            f"The processes of this run cannot meet at {printable(where)} ({excerpt(on_one_line(error), 240)}); give "
            "the first machine's address and a port that nothing else uses: MASTER_ADDR and MASTER_PORT, --master-addr "
            "and --master-port of torchrun, or --main_process_ip and --main_process_port of accelerate launch."
        ) from None
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
    """The dtype that networks compute in. auto: bf16 on a device that supports it, else fp16; float32 on the CPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16(device) else torch.float16


def computing(precision: str, device: torch.device) -> dict[str, str]:
    """A process's device and precision in words, which must be the same in all processes of a run."""
    return {"train.precision": f"{compute_dtype(precision, device)} on {device.type}".removeprefix("torch.")}
