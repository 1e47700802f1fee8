"""Tensors of changes that are not low-rank, as LyCORIS writes them and ComfyUI reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from .changes import Change, Difference, Hadamard, Kronecker, Scaling
from .names import is_convolution
from .rotations import RowRotation


def algorithm_in_file(target: str, change: Change) -> str | None:
    """The algorithm whose keys a dialect needs to hold a change of a layer or parameter; None: no dialect has any."""
    part = target.rpartition(".")[2]
    if part in ("gamma", "beta") or (part == "bias" and not isinstance(change, Difference)):
        return None
    return change.algorithm


def tensors_of(name: str, target: str, change: Change, constraint_of_a_row: bool) -> dict[str, Tensor]:
    """{key: tensor} of a change that `algorithm_in_file` allows.

    name: the layer's in the file; constraint_of_a_row: whether an OFT's constraint is stated for one row, as LyCORIS
    does, or for all rows, as ComfyUI does
    """
    tensors: dict[str, Tensor | None] = {}
    match change:
        case Difference():
            tensors = {"diff_b" if target.endswith(".bias") else "diff": change.difference}
        case Hadamard():
            tensors = {"hada_w1_a": change.up, "hada_w1_b": change.down,
                       "hada_w2_a": change.up_2, "hada_w2_b": change.down_2}  # fmt: skip
            tensors |= {"alpha": _alpha(change.alpha, change.rank), "dora_scale": change.magnitude}
        case Kronecker():
            tensors = {
                **_factor("lokr_w1", change.left, change.left_down),
                **_factor("lokr_w2", change.right, change.right_down),
            }
            tensors |= {"alpha": _alpha(change.alpha, change.rank), "dora_scale": change.magnitude}
        case RowRotation():
            rows = change.shape[0]
            constraint = change.constraint / rows if constraint_of_a_row else change.constraint
            ones = [1, 1] if is_convolution(target) else []
            rescale = None if change.rescale is None else change.rescale.reshape(rows, 1, *ones)
            tensors = {"oft_blocks": change.blocks, "rescale": rescale, "alpha": torch.tensor(constraint)}
        case Scaling():
            by_column = change.factor.shape[0] == 1 and change.factor.shape[1] > 1
            factor = change.factor if change.offset else change.factor.float() - 1
            shape = (1, -1, 1, 1) if is_convolution(target) else (-1,)
            tensors = {"weight": factor.reshape(shape), "on_input": torch.tensor(int(by_column))}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items() if tensor is not None}


def _alpha(alpha: float | None, rank: int | None) -> Tensor:
    """The alpha to write: the rank, for a scale of 1, where there is none; without a rank its value has no effect."""
    return torch.tensor(float(rank or 1) if alpha is None else alpha)


def _factor(name: str, whole: Tensor, down: Tensor | None) -> dict[str, Tensor | None]:
    return {name: whole} if down is None else {f"{name}_a": whole, f"{name}_b": down}
