"""From a file or a state dict to a module with its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compressor import SemanticCompressor
from ..config import infer_config
from ..controlnet import ControlNet
from ..errors import CascadeError
from ..previewer import Previewer
from ..stage_a import StageA
from ..stage_b import StageB
from ..stage_c import StageC
from .attention import split_attention
from .files import read_safetensors

NETWORKS: dict[str, Any] = {
    "stage_a": StageA,
    "stage_b": StageB,
    "stage_c": StageC,
    "compressor": SemanticCompressor,
    "previewer": Previewer,
    "controlnet": ControlNet,
}

KIND_NAMES = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "compressor": "semantic compressor",
    "previewer": "previewer",
    "controlnet": "ControlNet",
}


def load_published_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Fills a network from published (or split-attention) names, strictly.

    A model on the meta device takes the tensors themselves, with no copy; any other copies their values.
    Raises CascadeError with the first missing, unexpected and misshapen names.
    """
    weights = split_attention(state_dict)
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CascadeError(
            f"The weights do not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Choose a file of this network and size, or let its configuration be inferred."
        )
    on_meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict(weights, strict=True, assign=on_meta)
    return model


def load_model(
    path: str | Path,
    expect: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations=nn,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """A network in evaluation mode from a safetensors file: (module, kind, config).

    The weights are the file's own pages, mapped, unless `dtype` or `device` ask for others.
    Raises CascadeError where the file cannot be read or is not of the kind `expect`.
    """
    weights, metadata = read_safetensors(path)
    try:
        kind, config = infer_config(weights, metadata)
    except CascadeError as error:
        raise CascadeError(f"{Path(path).name}: {error}") from None
    if expect is not None and kind != expect:
        raise CascadeError(f"{describe(path, kind, config)}, but {KIND_NAMES[expect]} is expected here.")
    if dtype is not None or torch.device(device).type != "cpu":
        weights = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in weights.items()
        }
    with torch.device("meta"):
        model = NETWORKS[kind].from_config(config, operations=operations)
    try:
        load_published_state_dict(model, weights)
    except CascadeError as error:
        raise CascadeError(f"{Path(path).name}: {error}") from None
    return model.eval().requires_grad_(False), kind, config


def describe(path: str | Path, kind: str, config: Mapping[str, Any]) -> str:
    """A file in a few words, such as "x.safetensors is a Stage C checkpoint (width 1536)"."""
    width = config.get("c_hidden")
    detail = f" (width {max(width) if isinstance(width, list | tuple) else width})" if width else ""
    return f"{Path(path).name} is a {KIND_NAMES[kind]} checkpoint{detail}"


def first_non_finite(model: nn.Module) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None. Reads every weight: for explaining a failure."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
