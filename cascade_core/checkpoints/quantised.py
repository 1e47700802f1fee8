"""8-bit weights with scales in ComfyUI's present and former layouts; other quantisations are recognised but not read.

ComfyUI's present layout: beside an 8-bit `….weight` its `weight_scale` (float32), `comfy_quant` (JSON as bytes, or all
of them in the header as `_quantization_metadata`), and perhaps the `input_scale` of its fp8 products, which we do not
need. Before: `scale_weight`, `scale_input`, and one `scaled_fp8` for the file. ComfyUI's own fp8 weights have one scale
each, its int8 weights one or one for each row; ours have one for each row, which are written as one if all are equal.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CascadeError, printable, quoted
from ..networks.quantisation import E4M3, INT8, LARGEST, QuantisedWeight, quantise, rounded
from .files import FLOATING

FP8 = {"float8_e4m3fn": E4M3, "float8_e5m2": torch.float8_e5m2}  # ComfyUI's names of them
FORMAT_NAMES = {**FP8, "int8_tensorwise": INT8}
_SCALES = (".weight_scale", ".scale_weight")
_BESIDE = (*_SCALES, ".input_scale", ".scale_input", ".comfy_quant")
# Part of a name that only one scheme writes, after a layer's name; the first match counts.
_OTHERS = (
    (".quant_state.bitsandbytes__nf4", "nf4 of bitsandbytes"),
    (".quant_state.bitsandbytes__fp4", "fp4 of bitsandbytes"),
    (".weight.absmax", "4-bit weights of bitsandbytes"),
    (".SCB", "int8 of bitsandbytes"),
    (".weight._data", "quanto's quantised weights"),
    (".qweight", "GPTQ's or AWQ's quantised weights"),
    (".weight_scale_2", "nvfp4"),
)
_HEADER = "_quantization_metadata"
MOST_CONF = 1000  # bytes of a layer's comfy_quant


def quantisation(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str | None:
    """The name of a file's quantisation that is not read, such as "nf4 of bitsandbytes", or None."""
    for part, scheme in _OTHERS:
        if any(part in name for name in tensors):
            return scheme
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant") and not tensor.is_meta:
            conf = tensor.flatten()[:MOST_CONF].tolist() if tensor.dtype == torch.uint8 else []
            scheme = _format(name, bytes(conf))
            if scheme not in FORMAT_NAMES:
                return f"ComfyUI's {printable(scheme, 40)}"
    for scheme in _header_formats(metadata or {}):
        if scheme not in FORMAT_NAMES:
            return f"ComfyUI's {printable(scheme, 40)}"
    for name, tensor in tensors.items():
        scaled = tensor.dtype == INT8 and scale_name(name, tensors) is not None
        if name.endswith(".weight") and tensor.dtype in (INT8, torch.uint8) and not scaled:
            return "8-bit whole numbers without scales"
    return None


def _format(name: str, conf: bytes) -> str:
    try:
        stated = _scheme(json.loads(conf))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        stated = None
    if not isinstance(stated, str):
        raise CascadeError(f"{printable(name)} does not state a format as JSON; download the file again.")
    return stated


def _scheme(stated: Any) -> Any:
    """The format of a layer; one whose weights are rotated before rounding does not have the format it states."""
    rotated = stated.get("convrot") or (stated.get("params") or {}).get("convrot")
    return f"{stated['format']} with convrot" if rotated else stated["format"]


def _header_formats(metadata: Mapping[str, str]) -> set[str]:
    text = metadata.get(_HEADER)
    try:
        layers = json.loads(text)["layers"].values() if text else ()
        return {str(_scheme(layer)) for layer in layers}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise CascadeError(
            f"The header's {_HEADER} is not JSON with layers and their formats; download the file again."
        ) from None


def without_stated(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata without the stated formats of weights that have their own `comfy_quant` tensor."""
    if not _header_formats(metadata):
        return dict(metadata)
    header = json.loads(metadata[_HEADER])
    kept = {layer: conf for layer, conf in header["layers"].items() if f"{layer}.comfy_quant" not in tensors}
    return {**metadata, _HEADER: json.dumps({**header, "layers": kept})}


def scale_name(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the scale that belongs to a `….weight`, or None."""
    stem = name.removesuffix(".weight")
    return next((stem + ending for ending in _SCALES if stem != name and stem + ending in tensors), None)


def is_beside(name: str) -> bool:
    """Whether a tensor only describes the quantisation of another."""
    return name.endswith(_BESIDE) or name == "scaled_fp8"


def split_quantised(
    file: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, QuantisedWeight]]:
    """(weights, 8-bit weights with one scale per row); 8-bit weights with other scales are dequantised to bf16."""
    weights = {name: tensor for name, tensor in tensors.items() if not is_beside(name)}
    quantised = {}
    for name, tensor in list(weights.items()):
        scale = scale_name(name, tensors)
        if scale is None:
            continue
        rows = _row_scale(tensor, checked_scale(file, name, tensor, tensors[scale]))
        if rows is None or tensor.dtype not in LARGEST:
            weights[name] = rescaled(file, name, tensor, tensors[scale]).to(torch.bfloat16)
        else:
            quantised[name] = QuantisedWeight(weights.pop(name), rows)
    return weights, quantised


def unscaled(file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies 8-bit weights by their scales, to bf16; leaves everything else unchanged."""
    weights, quantised = split_quantised(file, tensors)
    return {**weights, **{name: as_float(weight) for name, weight in quantised.items()}}


def as_float(weight: QuantisedWeight) -> Tensor:
    """A weight of a file, in bf16."""
    return dequantised(weight).to(torch.bfloat16)


def dequantised(weight: QuantisedWeight) -> Tensor:
    """A weight of a file in its original shape, in float32."""
    weight8, scale = weight
    return weight8.float() * scale.view(-1, *[1] * (weight8.ndim - 1))


def rescaled(file: str, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight times its scale, in float32. Raises CascadeError as `checked_scale`."""
    return weight.float() * checked_scale(file, name, weight, scale).float()


def checked_scale(file: str, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A scale that broadcasts with its weight.

    Raises CascadeError for a scale that would change its weight's shape: the product of a row and a column may be far
    larger than the file.
    """
    scale = _by_row(scale, weight)
    floating = scale.dtype in FLOATING and (weight.dtype in FLOATING or weight.dtype == INT8)
    if not (floating and _broadcasts(scale, weight) and scale.float().isfinite().all()):
        raise CascadeError(
            f"{file}: {printable(name)} has a scale that does not fit it ({quoted(tuple(scale.shape))} for "
            f"{quoted(tuple(weight.shape))}, expected finite numbers, one or one a row); download the file again."
        )
    return scale


def _row_scale(weight: Tensor, scale: Tensor) -> Tensor | None:
    """A broadcasting scale as one per row, (out,) float32; None where it differs within a row."""
    if weight.ndim < 2 or weight.numel() == 0:
        return None
    if scale.numel() == 1:
        return scale.float().reshape(1).repeat(len(weight))
    if scale.numel() == len(weight) == scale.shape[0] and scale.ndim == weight.ndim:
        return scale.float().reshape(-1)
    return None


def _broadcasts(scale: Tensor, weight: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(scale.shape, weight.shape) == weight.shape
    except RuntimeError:
        return False


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    """A list of one scale per row as a column; for a square matrix it would otherwise count as one per column."""
    one_a_row = scale.ndim == 1 and weight.ndim > 1 and len(scale) == len(weight)
    return scale.view(-1, *[1] * (weight.ndim - 1)) if one_a_row else scale


def requantised(values: Tensor, dtype: torch.dtype, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(8-bit weight, its scale) of float32 values, by the largest of them; shaped and typed as `scale`."""
    like = _by_row(scale, values)
    whole = [size == 1 for size in (*[1] * (values.ndim - like.ndim), *like.shape)]
    shared = [dim for dim, one in enumerate(whole) if one]
    largest = values.abs().amax(shared, keepdim=True) if shared else values.abs()
    made = largest / LARGEST[dtype]
    made = torch.where(made > 0, made, 1.0).to(scale.dtype)
    return rounded(values / made.float(), dtype), made.reshape(scale.shape)


def fp8_layout(name: str, values: Tensor, dtype: torch.dtype = E4M3) -> dict[str, Tensor]:
    """A `….weight` in fp8 with one scale, in ComfyUI's present layout, as its own products on cards require."""
    return stored_layout(name, *requantised(values.float(), dtype, torch.ones(())))


def quantised_layout(name: str, weight: QuantisedWeight, shape: Sequence[int]) -> dict[str, Tensor]:
    """A `….weight` of this shape in 8 bits, in ComfyUI's present layout.

    Scales that are all equal become one, so that ComfyUI's files are reproduced exactly.
    """
    weight8, scale = weight
    same = not scale.is_meta and bool((scale == scale[0]).all())
    return stored_layout(name, weight8.view(*shape), scale[0].clone() if same else scale[:, None])


def written_layout(name: str, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A `….weight` of float values in 8 bits, in the form of our files: as ComfyUI's own products on cards require,
    fp8 with one scale, int8 with one for each row.
    """
    if dtype == INT8:
        weight8, scale = quantise(values, INT8)
        return stored_layout(name, weight8.view(values.shape), scale[:, None])
    return fp8_layout(name, values, dtype)


def stored_layout(name: str, weight8: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The three tensors of an 8-bit weight in ComfyUI's present layout."""
    stem = name.removesuffix(".weight")
    format_name = next(word for word, dtype in FORMAT_NAMES.items() if dtype == weight8.dtype)
    stated = json.dumps({"format": format_name}).encode()
    return {
        name: weight8,
        f"{stem}.weight_scale": scale,
        f"{stem}.comfy_quant": torch.tensor(list(stated), dtype=torch.uint8),
    }
