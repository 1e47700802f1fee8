"""Checkpoints: everything needed to resume a run, in one safetensors file, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import read_safetensors, write_safetensors
from ..errors import CascadeError, quoted

STATE = "state.safetensors"
ANEW = "put an earlier copy back, or begin anew with --fresh."
MAX_TABLE = 4096  # entries of an 8-bit optimiser's table
GROUP = "group."
OF_THE_SCHEDULE = ("lr", "share")  # entries of a group that are set anew at each step
PARTS = ("trained", "average", "optimiser", "buffers", "scaler")


def write_state(path: Path, parts: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Writes tensors by part (of PARTS) and name."""
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    write_safetensors(path, tensors, metadata)


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Reads (parts, metadata) as written. Raises CascadeError for a damaged file, with the advice to begin anew."""
    try:
        tensors, metadata = read_safetensors(path)
    except CascadeError as error:
        raise CascadeError(f"{str(error).partition(';')[0]}; {ANEW}") from None
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise CascadeError(
                f"{path} holds {quoted(name)}, which is not a part of a training state; {ANEW}"
            )
        parts[part][rest] = value
    return parts, metadata


def step_of(metadata: Mapping[str, str], path: Path) -> int:
    """The step after which a state was written."""
    text = metadata.get("step", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise CascadeError(f"{path} states {quoted(text)} as its step, which is not a number; {ANEW}")
    return int(text)


def rows_of(rows: int, index: int, parts: int) -> tuple[int, int]:
    """(first, end) of part `index` of a tensor's rows, divided as by `torch.chunk` and FSDP2; parts may be empty."""
    size = -(-rows // parts)
    return min(index * size, rows), min((index + 1) * size, rows)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    floating = ((name, value) for name, value in tensors.items() if value.is_floating_point())
    return next((name for name, value in floating if not value.isfinite().all()), None)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter number and field; plain numbers as scalars of float64 or int64.

    Read from `optimiser.state`, since `state_dict()` omits some of bitsandbytes' state. The numbers in parameter
    groups are state too: Prodigy keeps the rate that it found there, schedule-free optimisers their progress.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    tensors = {
        f"{index}.{name}": _as_tensor(value, name)
        for index, parameter in enumerate(parameters)
        for name, value in optimiser.state.get(parameter, {}).items()
    }
    for index, group in enumerate(optimiser.param_groups):
        numbers = {
            name: value
            for name, value in group.items()
            if name not in OF_THE_SCHEDULE and isinstance(value, int | float | Tensor)
        }
        tensors |= {f"{GROUP}{index}.{name}": _as_tensor(value, name) for name, value in numbers.items()}
    return tensors


def _as_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, int | float):
        raise CascadeError(
            f"The optimiser keeps {quoted(name)} as a {type(value).__name__}, which a checkpoint does not hold; choose "
            "another optimizer."
        )
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def load_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], path: Path, copy: bool = True
) -> None:
    """Restores the state that `optimiser_tensors` returned. Raises CascadeError for another optimiser's state.

    copy: whether to copy the tensors, because they belong to a file, for example; else the optimiser keeps them.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    groups = optimiser.state_dict()["param_groups"]
    for name, value in tensors.items():
        index, _, field = name.removeprefix(GROUP).partition(".")
        if name.startswith(GROUP):
            _restore_number(groups, _index_of(index, len(groups)), field, value, path)
            continue
        number = _index_of(index, len(parameters))
        # 8-bit state is flat, or has a few values per block of a parameter
        if number >= len(parameters) or value.numel() > max(parameters[number].numel(), MAX_TABLE):
            raise _of_another(path, name)
        if _is_plain(value):
            state.setdefault(number, {})[field] = value.item()
        else:
            state.setdefault(number, {})[field] = _in_layout_of(parameters[number], value) if copy else value
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _index_of(text: str, count: int) -> int:
    """A parameter's or group's number, or `count` where it does not exist."""
    return min(int(text), count) if text.isascii() and text.isdecimal() and len(text) < 10 else count


def _is_plain(value: Tensor) -> bool:
    return value.ndim == 0 and value.dtype in (torch.float64, torch.int64)


def _of_another(path: Path, name: str) -> CascadeError:
    return CascadeError(
        f"{path} holds {quoted(f'optimiser.{name}')}, which is of another optimiser or parameter; {ANEW}"
    )


def _restore_number(groups: list[dict[str, Any]], index: int, field: str, value: Tensor, path: Path) -> None:
    """Restores a number of a group, as a bool where it was one."""
    if index == len(groups) or field in ("params", *OF_THE_SCHEDULE) or value.ndim:
        raise _of_another(path, f"{GROUP}{index}.{field}")
    plain = value.item() if _is_plain(value) else value.clone()
    groups[index][field] = bool(plain) if isinstance(groups[index].get(field), bool) else plain


def scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The scale of the loss, and for how many steps it has been unchanged; empty where the loss is not scaled."""
    state = scaler.state_dict()
    names = {"scale": torch.float64, "_growth_tracker": torch.int64}
    return {name: torch.tensor(state[name], dtype=dtype) for name, dtype in names.items() if state}


def load_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Restores the result of `scaler_tensors`; without one, the scale starts anew."""
    if not (tensors and scaler.is_enabled()):
        return
    values = {name: value.item() for name, value in tensors.items() if value.numel() == 1}
    scale, growth = values.get("scale"), values.get("_growth_tracker")
    if not (
        isinstance(scale, float) and 0 < scale < float("inf") and isinstance(growth, int) and growth >= 0
    ):
        raise CascadeError(f"{path} holds no scale of the loss that a run can go on with; {ANEW}")
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": growth})


def _in_layout_of(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy in the parameter's memory format, if it has the parameter's shape, as fused AdamW requires."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
