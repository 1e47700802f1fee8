"""fp8 weights with a scale each, as ComfyUI writes them today and wrote them before, and by name what is not read.

ComfyUI's present layout: beside an fp8 `….weight` its `weight_scale` (float32), `comfy_quant` (JSON as bytes, or all of
them in the header as `_quantization_metadata`), and perhaps the `input_scale` of its fp8 products, which computing in
higher precision does not need. Before: `scale_weight`, `scale_input`, and one `scaled_fp8` for the file.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CascadeError, printable, quoted
from .files import FLOATING

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}  # ComfyUI's names of them
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
            if scheme not in FP8:
                return f"ComfyUI's {printable(scheme, 40)}"
    for scheme in _header_formats(metadata or {}):
        if scheme not in FP8:
            return f"ComfyUI's {printable(scheme, 40)}"
    if any(
        name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8)
        for name, tensor in tensors.items()
    ):
        return "8-bit whole numbers"
    return None


def _format(name: str, conf: bytes) -> str:
    try:
        stated = json.loads(conf)["format"]
    except (ValueError, RecursionError, TypeError, KeyError):
        stated = None
    if not isinstance(stated, str):
        raise CascadeError(f"{printable(name)} does not state a format as JSON; download the file again.")
    return stated


def _header_formats(metadata: Mapping[str, str]) -> set[str]:
    text = metadata.get(_HEADER)
    try:
        layers = json.loads(text)["layers"].values() if text else ()
        return {str(layer["format"]) for layer in layers}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise CascadeError(
            f"The header's {_HEADER} is not JSON with layers and their formats; download the file again."
        ) from None


def scale_name(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the scale that belongs to a `….weight`, or None."""
    stem = name.removesuffix(".weight")
    return next((stem + ending for ending in _SCALES if stem != name and stem + ending in tensors), None)


def is_beside(name: str) -> bool:
    """Whether a tensor only belongs to another's quantisation."""
    return name.endswith(_BESIDE) or name == "scaled_fp8"


def unscaled(file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies fp8 weights by their scales, to bf16; leaves everything else unchanged."""
    weights = {name: tensor for name, tensor in tensors.items() if not is_beside(name)}
    for name, tensor in weights.items():
        scale = scale_name(name, tensors)
        if scale is not None:
            weights[name] = rescaled(file, name, tensor, tensors[scale]).to(torch.bfloat16)
    return weights


def rescaled(file: str, name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight times its scale, in float32.

    Raises CascadeError for a scale that would change its weight's shape: a product of a row and a column is as large
    as a file claims, not as it is.
    """
    scale = _by_row(scale, weight)
    floating = scale.dtype in FLOATING and weight.dtype in FLOATING
    if not (floating and _broadcasts(scale, weight) and scale.float().isfinite().all()):
        raise CascadeError(
            f"{file}: {printable(name)} has a scale that does not fit it ({quoted(tuple(scale.shape))} for "
            f"{quoted(tuple(weight.shape))}, expected finite numbers, one or one a row); download the file again."
        )
    return weight.float() * scale.float()


def _broadcasts(scale: Tensor, weight: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(scale.shape, weight.shape) == weight.shape
    except RuntimeError:
        return False


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    """A list of one scale a row as a column, which else would be one for each column of a square."""
    one_a_row = scale.ndim == 1 and weight.ndim > 1 and len(scale) == len(weight)
    return scale.view(-1, *[1] * (weight.ndim - 1)) if one_a_row else scale


def requantised(values: Tensor, dtype: torch.dtype, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 weight, its scale) of float32 values, by the largest of them; shaped and typed as `scale`."""
    like = _by_row(scale, values)
    whole = [size == 1 for size in (*[1] * (values.ndim - like.ndim), *like.shape)]
    shared = [dim for dim, one in enumerate(whole) if one]
    largest = values.abs().amax(shared, keepdim=True) if shared else values.abs()
    made = largest / torch.finfo(dtype).max
    made = torch.where(made > 0, made, 1.0).to(scale.dtype)
    return (values / made.float()).to(dtype), made.reshape(scale.shape)


def fp8_layout(name: str, values: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """A `….weight` in fp8 with its scale, in ComfyUI's present layout."""
    weight, scale = requantised(values.float(), dtype, torch.ones(()))
    stem = name.removesuffix(".weight")
    format_name = next(word for word, known in FP8.items() if known == dtype)
    stated = json.dumps({"format": format_name}).encode()
    return {
        name: weight,
        f"{stem}.weight_scale": scale,
        f"{stem}.comfy_quant": torch.tensor(list(stated), dtype=torch.uint8),
    }
