"""Checkpoints: all that resuming a run needs, in one safetensors file, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import read_safetensors, write_safetensors
from ..errors import CascadeError

STATE = "state.safetensors"
PARTS = ("trained", "average", "optimiser", "buffers")


def write_state(path: Path, parts: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> None:
    """Write tensors by part (of PARTS) and name."""
    tensors = {
        f"{part}.{name}": value.detach().to("cpu", copy=True)
        for part, values in parts.items()
        for name, value in values.items()
    }
    write_safetensors(path, tensors, metadata)


def read_state(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Read (parts, metadata) as written."""
    tensors, metadata = read_safetensors(path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise CascadeError(
                f"{path} holds {name}, which is not a part of a training state; remove the file to begin anew."
            )
        parts[part][rest] = value
    return parts, metadata


def copy_into(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved values into tensors of the same names and shapes. Raises CascadeError where they differ."""
    differing = sorted(
        name
        for name in target.keys() | saved.keys()
        if name not in target or name not in saved or target[name].shape != saved[name].shape
    )
    if differing:
        raise CascadeError(
            f"{path} was written with other settings of what is trained (it differs in {len(differing)} tensors, such "
            f"as {differing[0]}); put the settings back, or begin anew with --fresh."
        )
    with torch.no_grad():
        for name, value in saved.items():
            target[name].copy_(value)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter number and field; plain numbers as scalars of float64 or int64.

    Read from the optimiser's own table: `state_dict()` leaves some of bitsandbytes' state out.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return {
        f"{index}.{name}": value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=_number_type(value))
        for index, parameter in enumerate(parameters)
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def _number_type(value: Any) -> torch.dtype:
    return torch.float64 if isinstance(value, float) else torch.int64


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `optimiser_tensors` gave."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        plain = value.ndim == 0 and value.dtype in (torch.float64, torch.int64)
        state.setdefault(int(index), {})[field] = (
            value.item() if plain else _in_layout_of(parameters[int(index)], value)
        )
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _in_layout_of(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy in the parameter's memory format where it has its shape, as fused AdamW needs it."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
