"""Networks divided among the processes by FSDP2, torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277).

Each process keeps its rows of every tensor, of their gradients, of the optimiser's state and of the average. A block is
gathered while it runs, forward and backward, and its gradients are reduced to everyone's rows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .gradient_checkpointing import CHECKPOINTED, blocks_of, segments_of
from .processes import Processes
from .state import rows_of

UNIT = 2**27  # weights gathered at a time: each exchange costs each process a millisecond, whatever its size


class Shards:
    """A network whose parameters are divided by their first dimension, in place.

    FSDP2 divides the blocks' matrices, 98 % of a network, and gathers them in the products' dtype, in units of blocks
    that follow each other. The rest are many and small: every process has them whole, of which it trains its rows.

    units        blocks that are gathered together
    parameters   this process's rows, by name: plain parameters that share the network's memory, so that optimisers,
                 averages and checkpoints need no knowledge of other processes
    """

    def __init__(self, network: nn.Module, processes: Processes, dtype: torch.dtype):
        """dtype: of the products."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.network, self.processes = network, processes
        lay_out_as_divided(network)
        names = dict(network.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in names.items()}
        mesh = init_device_mesh(processes.device.type, (processes.num_processes,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        matrices = {id(weight) for block in blocks_of(network, CHECKPOINTED) for weight in _matrices(block)}
        self.units = list(_units(network))
        with _only(matrices, network):
            for blocks in self.units:
                _make_uniform([parameter for block in blocks for parameter in block.parameters()])
                fully_shard(blocks, mesh=mesh, mp_policy=policy)
            fully_shard(network, mesh=mesh, mp_policy=policy)
        for block, *_ in self.units:  # older versions of torch move rows when they are first gathered
            block.unshard()
            block.reshard()
        now = dict(network.named_parameters())
        self._divided: dict[str, Any] = {name: now[name] for name in names if id(names[name]) in matrices}
        self._small = {name: names[name] for name in names if name not in self._divided}
        rows = {name: each.data[self._part(name)] for name, each in self._small.items()}
        rows |= {name: each.detach().to_local() for name, each in self._divided.items()}
        self.parameters = {name: nn.Parameter(rows[name], each.requires_grad) for name, each in names.items()}
        self._buffer, self._parts = self._buffer_of_small()
        network.register_forward_pre_hook(lambda *_: self._spread_small())

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each whole parameter."""
        return {name: shape[0] for name, shape in self.shapes.items()}

    def _part(self, name: str, index: int | None = None) -> slice:
        """The rows of a process, by default this one, in a whole parameter."""
        index = self.processes.process_index if index is None else index
        return slice(*rows_of(self.shapes[name][0], index, self.processes.num_processes))

    def _buffer_of_small(self) -> tuple[Tensor, list[tuple[list[Tensor], list[Tensor]]]]:
        """A buffer with a row for each process, and by process: views of its small rows there and in the network."""
        trained = {name: each.data for name, each in self._small.items() if each.requires_grad}
        sizes = [value[self._part(name, 0)].numel() for name, value in trained.items()]  # the first has most
        buffer = torch.zeros(self.processes.num_processes, sum(sizes), device=self.processes.device)
        parts = []
        for index, row in enumerate(buffer):
            own = [value[self._part(name, index)] for name, value in trained.items()]
            stored = zip(row.split(sizes), own, strict=True)
            parts.append(([values[: rows.numel()].view_as(rows) for values, rows in stored], own))
        return buffer, parts

    @torch.no_grad()
    def _spread_small(self) -> None:
        """Gives every process all rows of the small parameters, which one process each has trained."""
        if not self._buffer.numel():
            return
        index = self.processes.process_index
        torch._foreach_copy_(*self._parts[index])  # pyright: ignore[reportPrivateImportUsage]
        torch.distributed.all_gather_into_tensor(self._buffer.view(-1), self._buffer[index].clone())
        for other, (stored, rows) in enumerate(self._parts):
            if other != index:
                torch._foreach_copy_(rows, stored)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Moves the gradients to `parameters`: the matrices', reduced already, and the means of the others."""
        gradients = {
            name: each.grad.to_local() for name, each in self._divided.items() if each.grad is not None
        }
        if small := {name: each.grad for name, each in self._small.items() if each.grad is not None}:
            mean = self.processes.mean(torch.cat([gradient.flatten() for gradient in small.values()]))
            means = mean.split([gradient.numel() for gradient in small.values()])
            for (name, gradient), values in zip(small.items(), means, strict=True):
                gradients[name] = values.view_as(gradient)[self._part(name)]
        for name, gradient in gradients.items():
            if gradient.numel():
                self.parameters[name].grad = gradient
        for parameter in (*self._divided.values(), *self._small.values()):
            parameter.grad = None

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the network has these rows, such as an average's, without memory for a second copy."""
        pairs = [(self.parameters[name].data, value) for name, value in state.items()]
        pairs = [(own, other) for own, other in pairs if own.data_ptr() != other.data_ptr()]
        try:
            _exchange(pairs)
            yield
        finally:
            _exchange(pairs)

    def gather(self, name: str, values: Tensor) -> Tensor:
        """The whole tensor of a parameter's name, in the main process's main memory; values: this process's rows.

        The results in other processes must not be used.
        """
        processes, shape = self.processes, self.shapes[name]
        own, main = values.detach().cpu().contiguous(), processes.is_main_process
        whole = torch.empty(shape, dtype=own.dtype) if main else own
        for index in range(processes.num_processes):
            start, end = rows_of(shape[0], index, processes.num_processes)
            if index == processes.process_index and main:
                whole[start:end] = own
            elif main or index == processes.process_index:
                processes.to_main(whole[start:end] if main else own, index)
        return whole


def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for own, other in pairs:
            before = own.clone()
            own.copy_(other)
            other.copy_(before)


def lay_out_as_divided(network: nn.Module) -> None:
    """Gives a network the memory layout of one that is divided, so that its products round alike, whoever has it."""
    for parameter in network.parameters():  # `contiguous` keeps that of 1 × 1 convolutions
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).copy_(
            parameter.detach()
        )


def _matrices(block: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]


def _units(network: Any) -> Iterator[list[Any]]:
    """Neighbouring segments of a level, with up to UNIT weights, all with trained matrices or none of them."""
    for level, _ in network.levels():
        blocks, weights, wide = list[Any](), 0, False
        for segment in segments_of(level):
            matrices = [
                weight for block in segment if isinstance(block, CHECKPOINTED) for weight in _matrices(block)
            ]
            own = sum(weight.numel() for weight in matrices)
            trained = any(weight.dtype == torch.float32 for weight in matrices)
            if blocks and (weights + own > UNIT or trained != wide):
                yield blocks
                blocks, weights = [], 0
            blocks.extend(segment)
            weights, wide = weights + own, trained
        if blocks:
            yield blocks


@contextmanager
def _only(shown: Container[int], network: nn.Module) -> Iterator[None]:
    """Inside the block the network has no other parameters than these, given by their `id`."""
    others = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in shown
    ]
    for module, name, _ in others:
        module._parameters[name] = None
    try:
        yield
    finally:
        for module, name, parameter in others:
            module._parameters[name] = parameter


def _make_uniform(parameters: list[nn.Parameter]) -> None:
    """Makes parameters that are gathered together of one dtype, as FSDP2 requires. No value changes."""
    wide = any(parameter.dtype == torch.float32 for parameter in parameters)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32 if wide else parameter.dtype)
