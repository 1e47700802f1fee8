"""Golden files, published manifests and the hashed weights described in tests/golden/README.md."""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
CHUNK = 1 << 16  # elements hashed at a time: half a megabyte of float64, which stays in the cache


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and decoded metadata (`config`, `runs`, `note`) of golden/NAME.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    return tensors, metadata


def manifest_shapes(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """`{key: shape}` of a published checkpoint."""
    with gzip.open(GOLDEN / "checkpoint_manifests.json.gz", "rt") as file:
        return {key: tuple(shape) for key, (_, shape) in json.load(file)[checkpoint].items()}


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """`{key: shape}` of a module's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def hashed_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 weights that the golden networks have under this state-dict key."""
    scale, offset = _range(key, shape)
    phase = 2 * math.pi * zlib.crc32(key.encode()) / 2**32
    flat = torch.empty(math.prod(shape))
    for start in range(0, flat.numel(), CHUNK):
        stop = min(start + CHUNK, flat.numel())
        u = torch.arange(start, stop, dtype=torch.float64).mul_(12.9898).add_(phase).sin_().mul_(43758.5453)
        flat[start:stop] = u.sub_(u.floor()).mul_(scale).add_(offset)
    return flat.view(shape)


def _range(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(scale, offset) that turn u in [0, 1) into a weight."""
    if len(shape) >= 2:
        bound = math.sqrt(3 / math.prod(shape[1:]))
        return 2 * bound, -bound
    if key.endswith("running_var"):
        return 0.2, 1.0
    return 0.2, 0.9 if key.endswith("weight") else -0.1


def fill_hashed(module: nn.Module) -> nn.Module:
    """Gives a module, which may be on the meta device, its hashed weights and puts it in eval mode."""
    state = {}
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            state[key] = hashed_tensor(key, tuple(tensor.shape))
        else:
            state[key] = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
    module.load_state_dict(state, assign=True)
    return module.eval()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max |Δ| / max |reference|; shapes must agree."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    return ((value - reference).abs().max() / reference.abs().max()).item()
