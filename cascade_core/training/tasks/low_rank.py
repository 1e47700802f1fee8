"""Low-rank changes (LoRA, Hu et al. 2021, arXiv 2106.09685) of a frozen network, while they are trained.

The network's weights stay as they are: a layer's output gets up(down(x)) added. All factors of a network lie in one
float32 vector, so that a step casts them once, and the optimiser, the average and several accelerators deal with one
tensor instead of thousands.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...adapters import LowRank
from ...errors import CascadeError, quoted
from ...networks.layers import Attention

Factors = list[tuple[Tensor, Tensor]]


def is_target(layer: nn.Module) -> bool:
    """Whether a layer can have a low-rank change: it is linear, or a 1×1 convolution over all channels."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def select_layers(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to change, by name: all, attention (Stage C's and CLIP's), or patterns as `up_blocks.*.to_q`.

    A pattern matches a layer's whole name, or its end after a dot. Raises CascadeError for one that matches nothing.
    """
    layers = {name: layer for name, layer in network.named_modules() if is_target(layer)}
    inside = {
        id(layer) for module in network.modules() if _is_attention(module) for layer in module.modules()
    }
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        if pattern == "all":
            matches = layers
        elif pattern == "attention":
            matches = {name: layer for name, layer in layers.items() if id(layer) in inside}
        else:
            matches = {
                name: layer
                for name, layer in layers.items()
                if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
            }
        if not matches:
            raise CascadeError(
                f"{quoted(pattern)} matches none of the {len(layers)} layers of {type(network).__name__} that can be "
                f"changed, such as {', '.join(list(layers)[:3])}; give all, attention, or a pattern of such names."
            )
        chosen |= matches
    return {name: layer for name, layer in layers.items() if name in chosen}  # in the network's order


def check_rank(layers: Mapping[str, nn.Module], rank: int) -> None:
    """Raise CascadeError for a rank that no layer can have: it adds nothing but memory."""
    largest = max(min(layer.get_parameter("weight").shape[:2]) for layer in layers.values())
    if rank > largest:
        raise CascadeError(
            f"lora.rank is {rank}, but no change of these {len(layers)} layers has a rank above {largest}; give at "
            f"most {largest}, such as 16."
        )


def change_without_values(layer: nn.Module, rank: int, alpha: float | None) -> LowRank:
    """A change as `as_adapter` gives it, on the meta device: what a file would hold, before anything is trained."""
    rows, columns, *kernel = layer.get_parameter("weight").shape
    down, up = (torch.empty(*shape, *kernel, device="meta") for shape in ((rank, columns), (rows, rank)))
    return LowRank(down, up, alpha)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, Attention) or type(module).__name__.endswith("CLIPAttention")


class LowRankChanges(nn.Module):
    """Changes of `layers`, which are added inside `applied()` and nowhere else.

    vector    (N,) float32: every layer's down (rank, c_in), then every layer's up (c_out, rank)
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rank: int,
        alpha: float | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.layers: dict[str, Any] = dict(layers)  # a plain dict: they are another network's
        self.rank, self.alpha, self.dtype = rank, alpha, dtype
        self.scale = 1.0 if alpha is None else alpha / rank
        self.down_shapes = [(rank, layer.weight.shape[1]) for layer in self.layers.values()]
        self.up_shapes = [(layer.weight.shape[0], rank) for layer in self.layers.values()]
        downs = [
            # torch's own initial values of a linear layer; with up at zero, training begins with no change
            torch.empty(shape).uniform_(-1 / sqrt(shape[1]), 1 / sqrt(shape[1]), generator=generator)
            for shape in self.down_shapes
        ]
        ups = [torch.zeros(shape) for shape in self.up_shapes]
        self.vector = nn.Parameter(torch.cat([part.flatten() for part in (*downs, *ups)]))
        self._hooks = [layer.register_forward_hook(_add_change) for layer in self.layers.values()]
        self._set(None)

    def factors(self, vector: Tensor | None = None, dtype: torch.dtype | None = None) -> Factors:
        """(down, up · scale) of each layer, views of the vector cast once."""
        vector = self.vector if vector is None else vector
        sizes = [rows * columns for rows, columns in (*self.down_shapes, *self.up_shapes)]
        count = len(self.layers)
        down, up = vector.split([sum(sizes[:count]), sum(sizes[count:])])
        up = up * self.scale if self.scale != 1 else up
        dtype = dtype or self.dtype
        downs, ups = down.to(dtype).split(sizes[:count]), up.to(dtype).split(sizes[count:])
        return [
            (a.view(a_shape), b.view(b_shape))
            for a, a_shape, b, b_shape in zip(downs, self.down_shapes, ups, self.up_shapes, strict=True)
        ]

    @contextmanager
    def applied(self, vector: Tensor | None = None) -> Iterator[None]:
        """Add the changes inside the block. vector: other values for them, such as their average."""
        with self._with(self.factors(vector)):
            yield

    def current(self):
        """A context with the changes as they are now, for what is recomputed in the backward pass."""
        return self._with(self._current)

    @contextmanager
    def _with(self, factors: Factors | None) -> Iterator[None]:
        before = self._current
        self._set(factors)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, factors: Factors | None) -> None:
        self._current = factors
        for layer, pair in zip(self.layers.values(), factors or [None] * len(self.layers), strict=True):
            layer.__dict__["low_rank"] = pair  # nn.Module's own way takes ten times as long

    def remove(self) -> None:
        """Leave the network as it was before."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.__dict__.pop("low_rank", None)

    def as_adapter(self, vector: Tensor) -> dict[str, LowRank]:
        """The changes by layer, for a file, in the dtype of the vector; factors of convolutions have their shape."""
        plain = vector.detach().cpu()
        sizes = [rows * columns for rows, columns in (*self.down_shapes, *self.up_shapes)]
        parts = plain.split(sizes)
        count = len(self.layers)
        changes = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            down, up = parts[i].view(self.down_shapes[i]), parts[count + i].view(self.up_shapes[i])
            if isinstance(layer, nn.Conv2d):
                down, up = down[..., None, None], up[..., None, None]
            changes[name] = LowRank(down, up, self.alpha)
        return changes


def _add_change(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    if layer.low_rank is None:
        return None
    down, up = layer.low_rank
    x = inputs[0].to(down.dtype)
    if isinstance(layer, nn.Conv2d):  # (B, C, H, W) in channels-last memory: the permutes are views
        return output + F.linear(F.linear(x.permute(0, 2, 3, 1), down), up).permute(0, 3, 1, 2)
    return output + F.linear(F.linear(x, down), up)
