"""Drop-in replacement for a network that caches everything constant across sampling steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError
from ..networks.fp16 import stream_scale
from ..networks.layers import AttnBlock
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from ..networks.unet import UNet
from ..placement import WeightConsumer, out_of_memory
from . import operations
from .blocks import Missing
from .graphs import Graph, Pool, can_record
from .lru import LRU
from .unet import BoundUNet, Given, as_tokens
from .weights import Weights

SESSIONS = 4  # shapes of which prepared conditions, and on CUDA graphs, are kept
TABLES = 64  # noise conditions whose scales and shifts are kept: 1 MB each for Stage C 3.6 B

Precision = Literal["exact", "fp8"]
Conditions = dict[str, Tensor | None]
Dated = tuple[Tensor | None, int]


class Engine(WeightConsumer):
    """`engine(x, r, **conditions)` as `network(x, r, **conditions)`, for StageB and StageC in evaluation.

    Made once per network and kept; it follows the network where its weights are changed or moved. Where placement
    streams them, it runs each block as its weights are there, without graphs. What it cannot do the network does
    itself: another convolution than 3 × 3, a residual stream held for fp16 (fp16.py), noise conditions that differ
    within the batch, and weights that lie elsewhere than x, stand in another precision, or are changed as they are
    used.
    """

    def __init__(self, network: UNet, join: bool = False, precision: Precision = "exact"):
        """`join`: on CUDA, lay weights that are read together side by side, which moves them in memory.

        precision: of the products in the blocks. "exact" is that of the weights, best in bf16. "fp8" takes both sides
        in e4m3: faster, with an error of a few hundredths, on CUDA devices that multiply it; a call on another raises
        CascadeError. The network keeps its weights, for LoRAs and for what it does itself, and their e4m3 copies
        stand beside them: half as much memory as bf16 weights again.
        """
        if precision not in get_args(Precision):
            raise CascadeError(
                f"The engine's precision {precision!r} is not known; choose {' or '.join(get_args(Precision))}."
            )
        self.network, self.join = network, join
        self.precision: Precision = precision
        self.config = network.config
        self._bound: BoundUNet | None = None
        self._precision: Precision = precision  # of what is bound
        self._weights = Weights(network)
        self._tables: LRU[Tensor] = LRU(TABLES)
        self._sessions: LRU[Session] = LRU(SESSIONS)
        self._pool = Pool()

    def parameters(self) -> Any:
        return self.network.parameters()

    def beside(self, tokens: int = 0) -> int:
        """About how many bytes it makes beside the network's own weights and what a forward takes: weights of its own,
        keys and values for so many conditioning tokens of all images together.
        """
        copies = sum(p.numel() for p in self.parameters()) if self.precision == "fp8" else 0
        widths = sum(block.norm.normalized_shape[0] * repeats for block, repeats in self._attentions())
        return copies + 2 * tokens * widths * next(self.parameters()).dtype.itemsize

    def _attentions(self) -> Iterator[tuple[Any, int]]:
        """The network's attention blocks, and how often each runs in a forward."""
        for blocks, repeats in self.network.levels():
            yield from ((block, repeats) for block in blocks if isinstance(block, AttnBlock))

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        r: Tensor,
        *,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        **conditions: Tensor | None,
    ) -> Tensor:
        operations_on(x.device, self.precision)  # says so where there is none
        extra = {name: value for name, value in (("sca", sca), ("crp", crp)) if value is not None}
        noise = _numbers({"r": r, **extra})
        arrivals = self._follow()
        plain = stream_scale(self.network) == 1 and self._weights.plain(x, arrivals)
        if noise is None or self.config.kernel_size != 3 or not plain:
            extra = {**extra, **({} if control is None else {"control": control})}
            return self.network(x, r.to(x.device), **conditions, **extra)
        # Where memory is too short for the weights, there is none for copies of them.
        precision: Precision = self.precision if arrivals is None else "exact"
        ops, bound = self._bind(x, precision)
        session = self._session(x, conditions, control or ())
        given, tokens = session.prepare(bound, x, conditions, control or ())
        key = tuple(sorted(noise.items()))
        table, embedding = self._tables.get(key), None
        if table is None:
            table = x.new_empty(bound.table_size, dtype=torch.float32)
            embedding = bound.embedding(noise.pop("r"), noise)
        missing = Missing(embedding, tokens, table, given.keys, given.values)
        if arrivals is None:
            bound.prepare(missing)
            out = session.run(bound, ops, x, given, table)
        else:
            out = bound.streamed(ops, x, replace(given, table=table), arrivals, missing)
        self._tables.get_or_create(key, lambda: table)  # now that all of it is made
        session.prepared(conditions)
        return out

    def forget(self) -> None:
        """Free everything derived from the weights, with the graphs' memory."""
        self._bound = None
        self._tables.clear()
        self.offload()

    def offload(self) -> None:
        """Free what cannot be used, or is not worth its memory, while weights are away: they will lie elsewhere.

        What is small and depends on their values alone is kept: they are recognised when they come back.
        """
        if self._precision == "fp8":
            self._bound = None
        self._pool = Pool()
        for session in self._sessions.values():
            session.clear(self._pool)

    def graph_bytes(self, device: torch.device) -> int:
        """Bytes on the device that the allocator keeps for its CUDA graphs."""
        return self._pool.sizes.get(device, 0)

    def _follow(self) -> Any:
        """Lets go of what does not hold any more; what brings weights as they are used, if anything does."""
        arrivals = None if self.placement is None else self.placement.stream
        if not (self._weights.unchanged() if self.placement is None else self._weights.same()):
            self.forget()
            self._weights = Weights(self.network)
        elif self.placement is not None and arrivals is None and self._weights.moved():
            self.offload()
        return arrivals

    def _bind(self, x: Tensor, precision: Precision) -> tuple[Any, BoundUNet]:
        """Operations, and the network bound for them."""
        ops = operations_on(x.device, precision)
        if self._bound is None or self._precision != precision:
            self.forget()
            join = self.join and x.is_cuda and self.placement is None  # there they lie so already
            operand = ops.operand if precision == "fp8" else None
            self._bound, self._precision = BoundUNet(self.network, join, operand), precision
            self._weights = Weights(self.network)  # joining moves some
        return ops, self._bound

    def _session(self, x: Tensor, conditions: dict, control: Sequence) -> Session:
        key = (
            tuple(x.shape),
            x.dtype,
            x.device,
            tuple((name, None if t is None else tuple(t.shape)) for name, t in sorted(conditions.items())),
            tuple(None if residual is None else tuple(residual.shape) for residual in control),
        )
        return self._sessions.get_or_create(
            key, lambda: Session(self.network, self._pool, can_record(x.device))
        )


class Session:
    """Forwards of one shape, of x and of all conditions: what was prepared for them, and on CUDA their graph."""

    def __init__(self, network: UNet, pool: Pool, records: bool):
        self.network, self.records = network, records
        self.compiled = False
        self.clear(pool)

    def clear(self, pool: Pool) -> None:
        """As new, but for the kernels that were compiled."""
        self.graph = Graph(pool) if self.records else None
        self.ran = False  # so that a graph can be recorded
        self.given: Given | None = None
        self.conditions: dict[str, Dated] | None = None  # that `given` was made of
        self.control: list[Dated] = []

    def prepare(
        self, bound: BoundUNet, x: Tensor, conditions: Conditions, control: Sequence
    ) -> tuple[Given, Tensor | None]:
        """(given, tokens): what a forward needs but for its table, and, unless the conditions are the last call's, SiLU
        of their tokens (B, T, C_cond), of which its keys and values have yet to be made.
        """
        given, tokens = self.given, None
        if given is None or self.conditions is None or not _equal(conditions, self.conditions):
            self.conditions = None  # until all is made of them
            tokens, added = PREPARE[type(self.network)](self.network, x, **conditions)
            tokens = F.silu(tokens)
            if given is None:
                table = x.new_empty(bound.table_size, dtype=torch.float32)
                keys, values = ([None] * bound.attentions for _ in range(2))
                given = self.given = Given(table, keys, values, added)
                given.control = [None if t is None else torch.empty_like(t) for t in control]
            else:
                _copy([given.conditions], [added])
        if len(control) != len(self.control) or not all(map(_untouched, control, self.control)):
            _copy(given.control, control)
            self.control = [_dated(residual) for residual in control]
        return given, tokens

    def prepared(self, conditions: Conditions) -> None:
        """A forward with these conditions is done."""
        self.conditions = {name: _dated(value) for name, value in conditions.items()}

    def run(self, bound: BoundUNet, ops: Any, x: Tensor, given: Given, table: Tensor) -> Tensor:
        given.table.copy_(table)
        if self.graph is not None and self.ran:
            try:
                return self.graph(lambda still: bound(ops, still, given), x)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.graph = None  # it is a little slower without
        if not self.compiled:
            ops.compile_ahead(lambda: bound(ops, x, given))
        self.ran = self.compiled = True
        return bound(ops, x, given)


def _stage_c(
    network: StageC, x: Tensor, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor
) -> tuple[Tensor, None]:
    return network.embed_conditions(clip_text, clip_text_pooled, clip_img), None


def _stage_b(
    network: StageB, x: Tensor, clip: Tensor, effnet: Tensor, pixels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from_effnet, from_pixels = network.map_conditions(x, effnet, pixels)
    return network.embed_conditions(clip), as_tokens(from_effnet + from_pixels)


PREPARE: dict[type, Any] = {StageC: _stage_c, StageB: _stage_b}


def _numbers(values: dict[str, Tensor]) -> dict[str, float] | None:
    """Each tensor (B,) as the one number that stands in it, or None where one holds several."""
    numbers = {}
    for name, value in values.items():
        numbers[name], *others = value.tolist()
        if any(other != numbers[name] for other in others):
            return None
    return numbers


def _dated(value: Tensor | None) -> Dated:
    """With its version, which tells whether it was written to since; tensors made in inference mode have none."""
    return value, 0 if value is None or value.is_inference() else value._version


def _untouched(now: Tensor | None, before: Dated) -> bool:
    """The same tensor, which was not written to since."""
    return now is before[0] and _dated(now)[1] == before[1]


def _equal(now: Conditions, before: dict[str, Dated]) -> bool:
    """The same tensors, or others of the same values: a host may join its prompts anew at each step."""
    for name, value in now.items():
        known = before.get(name, (None, 0))
        if _untouched(value, known):
            continue
        old = known[0]
        if value is old or value is None or old is None or not torch.equal(value, old):
            return False
    return True


def _copy(kept: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> None:
    for target, source in zip(kept, new, strict=True):
        if target is not None and source is not None:
            target.copy_(source)


@cache
def operations_on(device: torch.device, precision: Precision = "exact") -> Any:
    """The fused kernels where they run, else plain PyTorch.

    Raises CascadeError for fp8 where the device does not multiply it: below Ada.
    """
    capability = _capability(device)
    if precision == "fp8":
        if capability < (8, 9):
            raise CascadeError(
                "fp8 needs an NVIDIA card of compute capability 8.9 or newer (RTX 40 series, L4, H100) with Triton, "
                f"and {_described(device)} is not one; choose another precision."
            )
        from . import fp8

        return fp8
    if capability >= (8, 0):
        from . import cuda

        return cuda
    if device.type == "cpu":
        operations.keep_freed_memory()
    return operations


def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where no kernels run."""
    has_kernels = device.type == "cuda" and find_spec("triton")
    return torch.cuda.get_device_capability(device) if has_kernels else (0, 0)


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return "the processor" if device.type == "cpu" else str(device)
    triton = "" if find_spec("triton") else ", without Triton,"
    return torch.cuda.get_device_name(device) + triton
