"""Builds the change of one layer from a file's tensors, whatever their algorithm.

Shapes are checked here, so that a change is built only where its factors belong together; whether it fits a network is
checked by `Change.fits`, from the factors' shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.files import FLOATING
from ..errors import CascadeError, quoted
from .changes import (
    Change,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    Scaling,
    belong_together,
)
from .names import is_convolution
from .peft import LARGEST_ALPHA, with_singular_values
from .rotations import ColumnRotation, RowRotation

# The endings that programs put after a layer's name, and the part that each means.
ENDINGS = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora_A", ".lora.down.weight",
                     "_lora.down.weight", ".lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora_B", ".lora.up.weight",
                     "_lora.up.weight", ".lora_linear_layer.up.weight"), "up"),
    **dict.fromkeys((".lora_E", ".lora_E.default"), "singular"),
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    **dict.fromkeys((".dora_scale", ".magnitude"), "magnitude"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "row_magnitude"),
    **dict.fromkeys((".diff", ".w_norm"), "diff"),
    **dict.fromkeys((".diff_b", ".b_norm"), "diff_b"),
    **{f".{part}": part for part in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "oft_blocks", "rescale", "boft_R", "boft_s", "on_input", "ia3_l",
    )},
    ".oft_R.weight": "oft_R",
    ".set_weight": "weight",
}  # fmt: skip
# Endings of PEFT's `modules_to_save` and biases, and of LyCORIS' (IA)³, read only if the file says that it holds these.
WHOLE = {".weight": "weight", ".bias": "bias", ".gamma": "gamma", ".beta": "beta"}
NOT_FLOATING = ("alpha", "on_input")
READ = "LoRA, DoRA, LoHa, LoKr, full differences, (IA)³, OFT and BOFT"

_LARGEST_KERNEL = 15  # side of a convolution's kernel in Tucker form, which is multiplied out
_MOST_TERMS = 100  # of a Neumann series
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Parts = Mapping[str, Tensor]


class Layer(NamedTuple):
    """The layer whose tensors are read.

    name      ours
    theirs    the file's
    where     the file and the layer, for messages
    settings  PEFT's configuration, or nothing
    alpha_of  gives the alpha of a rank where the file has none; None: the rank
    """

    name: str
    theirs: str
    where: str
    settings: Mapping[str, object]
    alpha_of: Callable[[int], float | None]


def changes_of(layer: Layer, parts: Parts) -> dict[str, Change]:
    """{the layer, or a parameter of it: its change}; empty for parts of no known algorithm. Raises CascadeError for
    parts that do not belong together, or that change one parameter in two ways.
    """
    found = [algorithm for algorithm in _ALGORITHMS if algorithm.keys & parts.keys()]
    names = " and ".join(algorithm.name for algorithm in found)
    others = parts.keys() - {"alpha"}.union(*(algorithm.keys | algorithm.others for algorithm in found))
    if found and others:
        raise CascadeError(
            f"{layer.where} has {', '.join(sorted(others))} beside {names}, which is not known to belong to it; merge "
            "it into its model with the program that made it."
        )
    changes: dict[str, Change] = {}
    for algorithm in found:
        for parameter, change in algorithm.read(layer, parts).items():
            target = f"{layer.name}.{parameter}" if parameter else layer.name
            if target in changes:
                raise CascadeError(
                    f"{layer.where} is changed in several ways ({names}), and which counts cannot be told; choose a "
                    "file with one of them."
                )
            changes[target] = change
    return changes


def _low_rank(layer: Layer, parts: Parts) -> dict[str, Change]:
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None or not belong_together(down, up):
        raise CascadeError(
            f"{layer.where} has no down (rank, c_in) and up (c_out, rank) that belong together ({_shape(down)} and "
            f"{_shape(up)}); download it again."
        )
    alpha = _alpha(layer, parts, len(down))
    if "mid" in parts:
        down = _multiplied_out(layer, parts["mid"], down)
        if len(down) != up[0].numel():
            raise _apart(layer, "LoRA in Tucker form", [down, up])
    if "singular" in parts or layer.settings.get("peft_type") == "ADALORA":
        down = with_singular_values(down, parts.get("singular"), layer.where)
    if is_convolution(layer.name):
        down, up = _as_kernels(layer.name, down), up.reshape(len(up), -1, 1, 1)
    change = LowRank(down, up, alpha, _magnitude(layer, len(up), down.shape[1], parts))
    if "up_bias" not in parts:
        return {"": change}
    bias = _checked(layer, "lora_B.bias", parts["up_bias"], dims=(1,))
    return {"": change, "bias": Difference(bias if change.scale == 1 else bias.float() * change.scale)}


def _as_kernels(layer: str, down: Tensor) -> Tensor:
    """Reshapes kernels that ComfyUI's trainer writes as matrices, (rank, c_in · k²)."""
    size = math.isqrt(down.shape[1]) if layer.endswith("depthwise") else 1
    return down.view(len(down), -1, size, size) if down.ndim == 2 and down.shape[1] % size**2 == 0 else down


def _multiplied_out(layer: Layer, core: Tensor, down: Tensor) -> Tensor:
    """Tucker form's core (rank, rank_in, k, k) and down (rank_in, c_in) as one down (rank, c_in, k, k)."""
    kernel, down = core.shape[2:], down.flatten(1)
    if core.ndim != 4 or core.numel() == 0 or core.shape[1] != len(down) or max(kernel) > _LARGEST_KERNEL:
        raise CascadeError(
            f"{layer.where} is in Tucker form, but its core {_shape(core)} and down {_shape(down)} do not belong "
            "together; download it again."
        )
    return torch.einsum("ijkl,jc->ickl", core.float(), down.float())


def _hadamard(layer: Layer, parts: Parts) -> dict[str, Change]:
    ups, downs = [], []
    for number in (1, 2):
        up, down = (_part(layer, parts, f"hada_w{number}_{letter}") for letter in "ab")
        if f"hada_t{number}" in parts:
            up, down = up.flatten(1).T, _multiplied_out(layer, parts[f"hada_t{number}"], down)
        ups.append(up.flatten(1))
        downs.append(down.flatten(1))
    shapes = {(len(up), down.shape[1]) for up, down in zip(ups, downs, strict=True)}
    ranks = {size for up, down in zip(ups, downs, strict=True) for size in (up.shape[1], len(down))}
    if len(shapes) > 1 or len(ranks) > 1:
        raise _apart(layer, "LoHa", [*ups, *downs])
    alpha = _alpha(layer, parts, len(downs[0]))
    magnitude = _magnitude(layer, len(ups[0]), downs[0].shape[1], parts)
    return {"": Hadamard(downs[0], ups[0], downs[1], ups[1], alpha, magnitude)}


def _kronecker(layer: Layer, parts: Parts) -> dict[str, Change]:
    left, left_down = _factor(layer, parts, "lokr_w1")
    right, right_down = _factor(layer, parts, "lokr_w2")
    ranks = {len(down) for down in (left_down, right_down) if down is not None}
    if len(ranks) > 1:
        raise _apart(layer, "LoKr", [left, right])
    if ranks:
        alpha = _alpha(layer, parts, min(ranks))
    else:
        alpha = None
        rank = layer.settings.get("r")  # PEFT scales whole factors too; the file states no scale
        stated = layer.alpha_of(rank) if type(rank) is int and rank > 0 else None
        if stated is not None and layer.settings.get("rank_pattern"):
            raise CascadeError(
                f"{layer.where} is a LoKr of whole matrices, whose rank in rank_pattern cannot be told; merge it into "
                "its model with the program that made it."
            )
        if stated is not None and type(rank) is int:
            left = left.float() * (stated / rank)
    change = Kronecker(left, right, left_down, right_down, alpha)
    rows, columns = change.shape
    magnitude = _magnitude(layer, rows, columns, parts)
    return {"": Kronecker(left, right, left_down, right_down, alpha, magnitude)}


def _factor(layer: Layer, parts: Parts, name: str) -> tuple[Tensor, Tensor | None]:
    """One of LoKr's two factors: (matrix, None), or its own low-rank factors (up, down)."""
    if name in parts:
        return _part(layer, parts, name).flatten(1), None
    up, down = (_part(layer, parts, f"{name}_{letter}") for letter in "ab")
    core = parts.get("lokr_t2") if name == "lokr_w2" else None
    if core is not None:
        up, down = up.flatten(1).T, _multiplied_out(layer, core, down)
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != len(down):
        raise _apart(layer, "LoKr", [up, down])
    return up, down


def _full(layer: Layer, parts: Parts) -> dict[str, Change]:
    names = {"diff": "", "diff_b": "bias"}
    return {
        parameter: Difference(_checked(layer, part, parts[part], dims=(1, 2, 4)))
        for part, parameter in names.items()
        if part in parts
    }


def _whole(layer: Layer, parts: Parts) -> dict[str, Change]:
    return {
        "" if part == "weight" else part: Replacement(_checked(layer, part, parts[part], dims=(1, 2, 4)))
        for part in WHOLE.values()
        if part in parts and not (part == "weight" and "on_input" in parts)  # a scaling's own weight
    }


def _scaling(layer: Layer, parts: Parts) -> dict[str, Change]:
    factor, on_input = parts.get("weight"), parts["on_input"]
    if factor is None or factor.numel() != max(factor.shape, default=0) or on_input.numel() != 1:
        raise _apart(layer, "(IA)³", [on_input, *([] if factor is None else [factor])])
    shape = (1, -1) if on_input.item() else (-1, 1)
    return {"": Scaling(_checked(layer, "weight", factor, dims=(1, 2, 4)).reshape(shape), offset=1)}


def _peft_scaling(layer: Layer, parts: Parts) -> dict[str, Change]:
    factor = _checked(layer, "ia3_l", parts["ia3_l"], dims=(2, 4))
    if factor.ndim == 4 or 1 not in factor.shape:
        raise CascadeError(
            f"{layer.where} has an (IA)³ of the shape {_shape(factor)}, of which it cannot be told whether it scales "
            "rows or columns; merge it into its model with the program that made it."
        )
    by_row = factor.shape[1] == 1
    return {"": Scaling(factor), **({"bias": Scaling(factor)} if by_row else {})}


def _row_rotation(layer: Layer, parts: Parts) -> dict[str, Change]:
    blocks = _blocks(layer, _checked(layer, "oft_blocks", parts["oft_blocks"], dims=(3, 4)))
    rows = blocks.shape[-3] * blocks.shape[-1]
    constraint = _alpha(layer, parts, 1) if "alpha" in parts else None
    # LyCORIS states the constraint per row, ComfyUI's trainer for all rows together.
    everywhere = layer.theirs.startswith(("diffusion_model.", "text_encoders."))
    return {
        "": RowRotation(
            blocks, _rescale(layer, parts, "rescale", rows), (constraint or 0.0) * (1 if everywhere else rows)
        )
    }


def _boft_of_columns(layer: Layer, parts: Parts) -> dict[str, Change]:
    blocks = _blocks(layer, _checked(layer, "boft_R", parts["boft_R"], dims=(4,)))
    return {"": ColumnRotation(blocks, _rescale(layer, parts, "boft_s", None))}


def _oft_of_columns(layer: Layer, parts: Parts) -> dict[str, Change]:
    triangle = _checked(layer, "oft_R", parts["oft_R"], dims=(2,))
    change = ColumnRotation(triangle, None, *_rotation_settings(layer))
    if change.size * (change.size - 1) // 2 != triangle.shape[1]:
        raise _apart(layer, "OFT", [triangle])
    return {"": change}


def _rotation_settings(layer: Layer) -> tuple[int | None, float | None]:
    """(terms, epsilon) of PEFT's OFT by its configuration."""
    settings = layer.settings
    neumann, terms = settings.get("use_cayley_neumann"), settings.get("num_cayley_neumann_terms")
    constrained, epsilon = settings.get("coft"), settings.get("eps")
    if settings.get("peft_type") != "OFT" or type(neumann) is not bool or type(constrained) is not bool:
        raise CascadeError(
            f"{layer.where} is an OFT whose file does not say how its rotations are computed; put PEFT's "
            "adapter_config.json beside it, or merge it into its model with the program that made it."
        )
    version = str(settings.get("peft_version", "0")).split(".")
    old = not all(part.isdecimal() for part in version[:2]) or [int(part[:4]) for part in version[:2]] < [
        0,
        18,
    ]
    if neumann and (old or type(terms) is not int or not 1 <= terms <= _MOST_TERMS):
        raise CascadeError(
            f"{layer.where} is an OFT of PEFT {quoted('.'.join(version))} with {quoted(terms)} terms of its Neumann "
            f"series, but PEFT 0.18 or newer and at most {_MOST_TERMS} are read; merge it into its model where it was "
            "made."
        )
    if constrained and not (type(epsilon) is float and 0 < epsilon <= 1):
        raise CascadeError(
            f"{layer.where} is a constrained OFT whose eps is {quoted(epsilon)}; download it again."
        )
    return (
        terms if neumann and type(terms) is int else None,
        epsilon if constrained and type(epsilon) is float else None,
    )


def _blocks(layer: Layer, blocks: Tensor) -> Tensor:
    """OFT's or BOFT's blocks, checked to be square; a butterfly's have to cover all rows."""
    count, size = blocks.shape[-3], blocks.shape[-1]
    levels = len(blocks) if blocks.ndim == 4 else 1
    joined = levels == 1 or (size % 2 == 0 and levels <= count and count % 2 ** (levels - 1) == 0)
    if blocks.shape[-2] != size or not joined:
        raise _apart(layer, "OFT", [blocks])
    return blocks


def _rescale(layer: Layer, parts: Parts, name: str, rows: int | None) -> Tensor | None:
    if name not in parts:
        return None
    rescale = _checked(layer, name, parts[name], dims=(1, 2, 4))
    if rescale.numel() != max(rescale.shape) or rows not in (None, rescale.numel()):
        raise _apart(layer, "OFT", [rescale])
    return rescale.reshape(-1, 1)


class _Algorithm(NamedTuple):
    """keys: the parts that identify it; others: parts that may stand beside them"""

    name: str
    keys: set[str]
    others: set[str]
    read: Callable[[Layer, Parts], dict[str, Change]]


_MAGNITUDES = {"magnitude", "row_magnitude"}
_ALGORITHMS = (
    _Algorithm("LoRA", {"down", "up"}, {"mid", "singular", "up_bias", *_MAGNITUDES}, _low_rank),
    _Algorithm(
        "LoHa",
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        {"hada_t1", "hada_t2", *_MAGNITUDES},
        _hadamard,
    ),
    _Algorithm(
        "LoKr",
        {"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"},
        {"lokr_w1_b", "lokr_w2_b", "lokr_t2", *_MAGNITUDES},
        _kronecker,
    ),
    _Algorithm("OFT", {"oft_blocks"}, {"rescale"}, _row_rotation),
    _Algorithm("PEFT's OFT", {"oft_R"}, set(), _oft_of_columns),
    _Algorithm("PEFT's BOFT", {"boft_R"}, {"boft_s"}, _boft_of_columns),
    _Algorithm("(IA)³", {"on_input"}, {"weight"}, _scaling),
    _Algorithm("PEFT's (IA)³", {"ia3_l"}, set(), _peft_scaling),
    _Algorithm("a difference", {"diff", "diff_b"}, set(), _full),
    _Algorithm("a whole parameter", set(WHOLE.values()), set(), _whole),
)


def _part(layer: Layer, parts: Parts, name: str) -> Tensor:
    if name not in parts:
        raise CascadeError(
            f"{layer.where} has no {name}, which belongs to {', '.join(parts)}; download it again."
        )
    return _checked(layer, name, parts[name], dims=(2, 4))


def _checked(layer: Layer, name: str, tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    if tensor.dtype not in FLOATING:
        raise CascadeError(
            f"{layer.where} has {name} in {tensor.dtype}, but floating point is expected; choose a LoRA that is not "
            "quantised."
        )
    if tensor.ndim not in dims or tensor.numel() == 0:
        expected = " or ".join(map(str, dims))
        raise CascadeError(
            f"{layer.where} has {name} of the shape {_shape(tensor)}, but {expected} dimensions are expected; download "
            "it again."
        )
    return tensor


def _apart(layer: Layer, algorithm: str, tensors: list[Tensor]) -> CascadeError:
    shapes = ", ".join(map(_shape, tensors))
    return CascadeError(
        f"{layer.where} has tensors of {algorithm} that do not belong together ({shapes}); download it again."
    )


def _alpha(layer: Layer, parts: Parts, rank: int) -> float | None:
    if "alpha" not in parts:
        return layer.alpha_of(rank)
    alpha = parts["alpha"]
    number = alpha.dtype in FLOATING or alpha.dtype in _WHOLE_NUMBERS
    if not (number and alpha.numel() == 1 and abs(alpha.item()) <= LARGEST_ALPHA):  # also true for NaN
        value = alpha.item() if alpha.numel() == 1 else alpha.flatten()[:9].tolist()
        raise CascadeError(
            f"{layer.where} has an alpha of {quoted(value)}, but one number is expected, of at most "
            f"{LARGEST_ALPHA:.0e}; download it again."
        )
    return float(alpha.item())


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


def _magnitude(layer: Layer, rows: int, columns: int, parts: Parts) -> Tensor | None:
    """DoRA's magnitudes: (c_out, 1), one per row of the weight, or (1, c_in), one per column; None for a plain LoRA."""
    magnitude = parts.get("row_magnitude", parts.get("magnitude"))
    if magnitude is None:
        return None
    if layer.name.endswith("depthwise"):
        rows, columns = (columns, 1) if rows == 1 else (rows, 1)  # OneTrainer's depthwise form has one row
    count, first = magnitude.numel(), (*magnitude.shape, 0)[0]
    if count == rows and ("row_magnitude" in parts or magnitude.ndim == 1 or first == rows):
        return magnitude.reshape(rows, 1)
    if count == columns and magnitude.ndim > 1 and first == 1 and "row_magnitude" not in parts:
        return magnitude.reshape(1, columns)
    raise CascadeError(
        f"{layer.where} has DoRA magnitudes of the shape {tuple(magnitude.shape)}, but {rows} rows and {columns} "
        "columns; download it again."
    )
