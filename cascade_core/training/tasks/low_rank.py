"""Low-rank changes (LoRA, Hu et al. 2021, arXiv 2106.09685) of a frozen network, while they are trained.

The network's weights do not change: up(down(x)), or the change by LoHa, LoKr or DoRA, is added to a layer's output.
All factors of a network lie in one float32 vector, or one for each learning rate, so that a step casts them once, and
the optimiser, the average and the exchange between accelerators handle one tensor instead of thousands.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters.changes import AddedChange
from ...errors import CascadeError, counted, printable, quoted
from ...networks.layers import Attention
from ..frozen import float_weight
from ..settings import LoRASettings
from .algorithms import Dropout, LoRA, Shapes, algorithm_of
from .names import check_patterns, is_match

Factors = list[tuple[Tensor, ...]]
MAGNITUDE = "magnitude"


def is_target(layer: nn.Module) -> bool:
    """Whether a layer can have a low-rank change: it is linear, or a 1×1 convolution over all channels."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def matrix_size(layer: Any) -> tuple[int, int]:
    """Rows and columns of a layer's weight, quantised or not."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def select_layers(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to change, by name: all, attention (Stage C's and CLIP's), or patterns such as `up_blocks.*.to_q`.

    A pattern matches a layer's whole name, or its end after a dot. Raises CascadeError for one that matches nothing.
    """
    layers = {name: layer for name, layer in network.named_modules() if is_target(layer)}
    check_patterns(patterns, "lora.targets")
    chosen = {name for pattern in patterns for name in _matching(network, layers, pattern, "lora.targets")}
    return {name: layer for name, layer in layers.items() if name in chosen}  # in the network's order


def _matching(network: nn.Module, layers: Mapping[str, nn.Module], pattern: str, key: str) -> list[str]:
    if pattern == "all":
        return list(layers)
    if pattern == "attention":
        attention = [module for module in network.modules() if _is_attention(module)]
        inside = {id(layer) for module in attention for layer in module.modules()}
        matches = [name for name, layer in layers.items() if id(layer) in inside]
    else:
        matches = [name for name in layers if is_match(name, pattern)]
    if not matches:
        raise CascadeError(
            f"{key}: {quoted(pattern)} matches none of the {len(layers)} layers of {type(network).__name__} that can "
            f"be changed, such as {', '.join(list(layers)[:3])}; give all, attention, or a pattern of such names."
        )
    return matches


def by_pattern(
    network: nn.Module, layers: Mapping[str, nn.Module], values: Mapping[str, Any], key: str
) -> dict[str, Any]:
    """{layer: value} of the layers that match a pattern; the last pattern that matches counts. key: for messages."""
    check_patterns(values, key)
    found: dict[str, Any] = {}
    for pattern, value in values.items():
        found |= dict.fromkeys(_matching(network, layers, pattern, key), value)
    return found


class LayerPlan(NamedTuple):
    """The rank, alpha and scale, and the share of the learning rate, of each layer that gets a change."""

    ranks: list[int]
    alphas: list[float | None]  # as files state them
    scales: list[float]
    rates: list[float]

    @classmethod
    def of(cls, network: nn.Module, layers: Mapping[str, nn.Module], settings: LoRASettings) -> "LayerPlan":
        rank_of = by_pattern(network, layers, settings.ranks, "lora.ranks")
        rate_of = by_pattern(network, layers, settings.rates, "lora.rates")
        ranks = [rank_of.get(name, settings.rank) for name in layers]
        alphas: list[float | None] = [settings.alpha] * len(ranks)
        if settings.rslora:  # alpha / sqrt(rank), expressed as another alpha / rank
            alphas = [(settings.alpha or rank) * sqrt(rank) for rank in ranks]
        scales = [1.0 if alpha is None else alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)]
        return cls(ranks, alphas, scales, [float(rate_of.get(name, 1.0)) for name in layers])


def check_ranks(layers: Mapping[str, nn.Module], used: Iterable[int], settings: LoRASettings) -> None:
    """Raises CascadeError for a used rank above that of every layer, which would only cost memory."""
    largest = max(min(matrix_size(layer)) for layer in layers.values())
    stated = {"lora.rank": settings.rank}
    stated |= {f"lora.ranks.{printable(pattern)}": rank for pattern, rank in settings.ranks.items()}
    for key, rank in stated.items():
        if rank > largest and rank in used:
            raise CascadeError(
                f"{key} is {rank}, but no change of the {counted(len(layers), 'layer')} has a rank above "
                f"{largest}; give at most {largest}, such as 16."
            )


def changes_without_values(
    network: nn.Module, layers: Mapping[str, nn.Module], settings: LoRASettings
) -> dict[str, AddedChange]:
    """Changes as by `as_adapter`, on the meta device: the contents of the later file, before training."""
    with torch.device("meta"):
        changes = LowRankChanges.of(network, layers, settings, hooked=False)
        return changes.as_adapter(changes.values())


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, Attention) or type(module).__name__.endswith("CLIPAttention")


class Slot(NamedTuple):
    """Position of a layer's factor in the vectors."""

    layer: int
    name: str
    shape: tuple[int, int]
    scale: float
    rate: float

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class LowRankChanges(nn.Module):
    """Changes of `layers`, which are added inside `applied()` and nowhere else.

    vector    (N,) float32: every layer's down (rank, c_in), then every layer's up (c_out, rank); other algorithms'
              factors likewise. Where there are several learning rates: vector_0, vector_1, …, one for each
    """

    vector: nn.Parameter

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rank: int,
        alpha: float | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        settings: LoRASettings | None = None,
        plan: LayerPlan | None = None,
        hooked: bool = True,
    ):
        """settings, plan: differences from a LoRA of that rank and alpha on every layer."""
        super().__init__()
        count, settings = len(layers), settings or LoRASettings()
        self.layers: dict[str, Any] = dict(layers)  # a plain dict: the modules are another network's
        scale = 1.0 if alpha is None else alpha / rank
        self.plan = plan or LayerPlan([rank] * count, [alpha] * count, [scale] * count, [1.0] * count)
        self.dtype = dtype
        self.algorithm = algorithm_of(settings.algorithm, settings.factor)
        self.dropout = Dropout(settings.dropout, settings.rank_dropout, settings.module_dropout)
        self.shapes: list[Shapes] = []
        for layer, layer_rank in zip(self.layers.values(), self.plan.ranks, strict=True):
            rows, columns = matrix_size(layer)
            shapes = self.algorithm.shapes(rows, columns, layer_rank)
            self.shapes.append({**shapes, MAGNITUDE: (rows, 1)} if settings.dora else shapes)
        names = list(dict.fromkeys(name for shapes in self.shapes for name in shapes))
        slots = [
            self._slot(i, name, settings.up_learning_rate) for name in names for i in range(count)
            if name in self.shapes[i]
        ]  # fmt: skip
        values = [self._initial(slot, generator) for slot in slots]
        rates = list(dict.fromkeys(slot.rate for slot in slots))
        order = sorted(range(len(slots)), key=lambda i: rates.index(slots[i].rate))
        self.slots = [slots[i] for i in order]
        self.names = ["vector"] if len(rates) == 1 else [f"vector_{i}" for i in range(len(rates))]
        for name, rate in zip(self.names, rates, strict=True):
            part = torch.cat([values[i].flatten() for i in order if slots[i].rate == rate])
            self.register_parameter(name, nn.Parameter(part))
        self.rates = rates
        # Neighbours with the same scale are scaled and cast together
        self._runs = [(scale, list(run)) for scale, run in groupby(self.slots, lambda slot: slot.scale)]
        self._hooks = [layer.register_forward_hook(_add_change) for layer in self.layers.values() if hooked]
        self._set(None)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        layers: Mapping[str, nn.Module],
        settings: LoRASettings,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        hooked: bool = True,
    ) -> "LowRankChanges":
        """Changes of some of a network's layers, by the settings."""
        plan = LayerPlan.of(network, layers, settings)
        check_ranks(layers, plan.ranks, settings)
        return cls(layers, settings.rank, settings.alpha, dtype, generator, settings, plan, hooked)

    def _slot(self, layer: int, name: str, up_rate: float) -> Slot:
        scaled = name == self.algorithm.scaled and self.algorithm.is_scaled(self.shapes[layer])
        rate = self.plan.rates[layer] * (up_rate if name == "up" else 1.0)
        return Slot(layer, name, self.shapes[layer][name], self.plan.scales[layer] if scaled else 1.0, rate)

    def _initial(self, slot: Slot, generator: torch.Generator | None) -> Tensor:
        if slot.name != MAGNITUDE:
            return self.algorithm.initial(slot.name, slot.shape, generator)
        weight = float_weight(list(self.layers.values())[slot.layer])
        return _row_norms(weight).to(torch.get_default_device())

    def groups(self, share: float = 1.0) -> list[dict[str, Any]]:
        """The optimiser's groups. share: of the learning rate, common to all groups."""
        pairs = zip(self.names, self.rates, strict=True)
        return [{"params": [self.get_parameter(name)], "share": rate * share} for name, rate in pairs]

    def values(self, state: Mapping[str, Tensor] | None = None, prefix: str = "") -> Tensor:
        """All factors as one vector: the trained ones, or those of a state under the prefix."""
        parts = [
            self.get_parameter(name) if state is None else state[f"{prefix}{name}"] for name in self.names
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def factors(self, vector: Tensor | None = None) -> Factors:
        """Each layer's factors, as views of the vector, which is cast once; one factor of each layer is scaled."""
        vector = self.values() if vector is None else vector
        parts: list[dict[str, Tensor]] = [{} for _ in self.layers]
        sizes = [sum(slot.size for slot in run) for _, run in self._runs]
        for (scale, run), part in zip(self._runs, vector.split(sizes), strict=True):
            part = (part * scale if scale != 1 else part).to(self.dtype)
            for slot, value in zip(run, part.split([slot.size for slot in run]), strict=True):
                parts[slot.layer][slot.name] = value.view(slot.shape)
        return [
            tuple(values[name] for name in shapes) for values, shapes in zip(parts, self.shapes, strict=True)
        ]

    @contextmanager
    def applied(self, vector: Tensor | None = None, kept: Tensor | None = None) -> Iterator[None]:
        """Adds the changes inside the block.

        vector: other values for them, such as their average; kept: `draw_layers`, on the changes' device
        """
        layers = [None] * len(self.layers) if kept is None else kept.unbind()
        current = [Applied(self, *each) for each in zip(self.factors(vector), layers, strict=True)]
        with self._with(current):
            yield

    def draw_layers(self) -> Tensor | None:
        """The layers whose change is kept in a step, on the changes' device; None for all."""
        kept = self.dropout.kept_layers(len(self.layers)) if self.training else None
        return None if kept is None else kept.to(self.get_parameter(self.names[0]).device)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward pass and of its recomputation: the same changes, dropout by the same masks."""
        masks: list[Tensor] = []
        return self.dropout.keeping(masks), self._again(self._current, masks)

    @contextmanager
    def _again(self, current: "Sequence[Applied] | None", masks: list[Tensor]) -> Iterator[None]:
        with self._with(current), self.dropout.taking(masks):
            yield

    @contextmanager
    def _with(self, current: "Sequence[Applied] | None") -> Iterator[None]:
        before = self._current if hasattr(self, "_current") else None
        self._set(current)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, current: "Sequence[Applied] | None") -> None:
        self._current = current
        for layer, values in zip(self.layers.values(), current or [None] * len(self.layers), strict=True):
            # nn.Module.__setattr__ takes ten times as long
            layer.__dict__["low_rank"] = values

    def remove(self) -> None:
        """Restores the network's own forwards."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.__dict__.pop("low_rank", None)

    def as_adapter(self, vector: Tensor) -> dict[str, AddedChange]:
        """The changes by layer, for a file, in the dtype of the vector; for convolutions, a LoRA's are kernels."""
        plain = vector.detach()
        plain = plain if plain.is_meta else plain.cpu()
        values: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for slot, part in zip(self.slots, plain.split([slot.size for slot in self.slots]), strict=True):
            values[slot.layer][slot.name] = part.view(slot.shape)
        changes = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            magnitude = values[i].pop(MAGNITUDE, None)
            if isinstance(layer, nn.Conv2d) and isinstance(self.algorithm, LoRA):
                values[i] = {key: value[..., None, None] for key, value in values[i].items()}
            changes[name] = self.algorithm.change(values[i], self.plan.alphas[i], magnitude)
        return changes

    @torch.no_grad()
    def begin_as(self, changes: Mapping[str, AddedChange], file: str) -> None:
        """Starts from a file's changes. For changes of a lower rank, the further ranks keep their initial values.

        Raises CascadeError for changes that these factors cannot hold.
        """
        unknown = sorted(changes.keys() - self.layers.keys())
        if unknown:
            raise CascadeError(
                f"lora.start: {file} changes {counted(len(unknown), 'layer')} that lora.targets leaves out, such as "
                f"{quoted(unknown[0])}; give targets that hold them."
            )
        parts = dict(zip(self.names, (self.get_parameter(name) for name in self.names), strict=True))
        whole = torch.cat([part.detach().flatten() for part in parts.values()])
        views: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for slot, part in zip(self.slots, whole.split([slot.size for slot in self.slots]), strict=True):
            views[slot.layer][slot.name] = part.view(slot.shape)
        for i, (name, layer) in enumerate(self.layers.items()):
            if name in changes:
                self._begin_layer_as(views[i], changes[name], layer, self.plan.scales[i], f"{file}: {name}")
        sizes = [part.numel() for part in parts.values()]
        for part, value in zip(parts.values(), whole.split(sizes), strict=True):
            part.copy_(value)

    def _begin_layer_as(
        self, views: dict[str, Tensor], change: AddedChange, layer: Any, scale: float, where: str
    ) -> None:
        own = self.algorithm.change({key: v for key, v in views.items() if key != MAGNITUDE}, None, None)
        if type(own) is not type(change):
            raise CascadeError(
                f"lora.start: {where} is a change by {change.algorithm}, but lora.algorithm makes {own.algorithm}; "
                "give the algorithm of the file."
            )
        magnitude = change.magnitude
        if magnitude is not None and (MAGNITUDE not in views or len(magnitude) != magnitude.numel()):
            raise CascadeError(
                f"lora.start: {where} has DoRA's magnitudes of {'rows' if MAGNITUDE not in views else 'columns'}; give "
                "dora: true, or a file that has none."
            )
        alpha, rank = getattr(change, "alpha", None), change.rank
        stated = 1.0 if alpha is None or rank is None else alpha / rank
        for key, view in views.items():
            if key == MAGNITUDE:
                continue
            value = getattr(change, key, None)
            value = value.float().flatten(1).to(view.device) if value is not None else view.new_zeros(0, 0)
            if key == self.algorithm.scaled and self.algorithm.is_scaled(dict.fromkeys(views, (0, 0))):
                value = value * (stated / scale)
            padded = isinstance(self.algorithm, LoRA) and all(
                size <= most for size, most in zip(value.shape, view.shape, strict=True)
            )
            if value.shape != view.shape and not (padded and value.numel()):
                raise CascadeError(
                    f"lora.start: {where} has {key} of {' × '.join(map(str, value.shape))}, but "
                    f"{' × '.join(map(str, view.shape))} is trained; give the rank of the file"
                    f"{' or more' if isinstance(self.algorithm, LoRA) else ''}."
                )
            if key == "up":
                view.zero_()
            view[: value.shape[0], : value.shape[1]] = value
        if MAGNITUDE in views:
            weight = float_weight(layer).to(views[MAGNITUDE].device)
            own = change.delta((len(weight), weight.shape[1])).to(weight.device)
            values = _row_norms(weight + own) if magnitude is None else magnitude.float().reshape(-1, 1)
            views[MAGNITUDE].copy_(values)


class Applied(NamedTuple):
    """A layer's change while it is added. kept: () bool, whether it is in this step, or None"""

    changes: LowRankChanges
    values: tuple[Tensor, ...]
    kept: Tensor | None


def _row_norms(weight: Tensor) -> Tensor:
    """(rows, 1)"""
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


NO_DROPOUT = Dropout()


def _add_change(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    if layer.low_rank is None:
        return None
    changes, values, kept = layer.low_rank
    dropout = changes.dropout if changes.training else NO_DROPOUT
    x = inputs[0].to(values[0].dtype)
    convolution = isinstance(layer, nn.Conv2d)
    if convolution:  # (B, C, H, W) in channels-last memory: the permutes are views
        x, output = x.permute(0, 2, 3, 1), output.permute(0, 2, 3, 1)
    if MAGNITUDE in changes.shapes[0]:
        result = _decomposed(layer, x, output, changes, values, dropout)
    else:
        result = output + changes.algorithm.added(x, values, dropout)
    if kept is not None:
        result = torch.where(kept, result, output)
    return result.permute(0, 3, 1, 2) if convolution else result


def _decomposed(
    layer: Any,
    x: Tensor,
    output: Tensor,
    changes: LowRankChanges,
    values: tuple[Tensor, ...],
    dropout: Dropout,
) -> Tensor:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude · (W + ΔW) / ‖W + ΔW‖, the norm over rows, as a constant."""
    *factors, magnitude = values
    with torch.no_grad():
        changed = float_weight(layer) + changes.algorithm.delta([f.float() for f in factors])
        norm = _row_norms(changed).clamp_min(torch.finfo(torch.float32).eps)
    bias = 0 if layer.bias is None else layer.bias
    factor = (magnitude.float() / norm).flatten().to(output.dtype)
    return (output - bias + changes.algorithm.added(x, factors, dropout)) * factor + bias
