"""Networks divided among the processes by FSDP2, torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277).

Each process keeps its rows of every tensor, of their gradients, of the optimiser's state and of the average. A block is
gathered while it runs, forward and backward, and its gradients are reduced to everyone's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .gradient_checkpointing import CHECKPOINTED, blocks_of
from .processes import Processes
from .state import rows_of


class Shards:
    """A network whose parameters are divided by their first dimension, in place.

    parameters   this process's rows, by name: plain parameters that share the network's memory, so that optimisers,
                 averages and checkpoints need no knowledge of other processes
    """

    def __init__(self, network: nn.Module, processes: Processes):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.network, self.processes = network, processes
        self.shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        mesh = init_device_mesh(processes.device.type, (processes.num_processes,))
        blocks = [*reversed(blocks_of(network, CHECKPOINTED)), network]
        divided: set[nn.Parameter] = set()
        for block in blocks:
            own = [parameter for parameter in block.parameters() if parameter not in divided]
            _make_uniform(own)
            fully_shard(block, mesh=mesh)
            divided.update(block.parameters())
        for block in blocks:  # older versions of torch move rows when they are first gathered
            block.unshard()
            block.reshard()
        self._divided: dict[str, Any] = dict(network.named_parameters())
        self.parameters = {
            name: nn.Parameter(each.detach().to_local(), each.requires_grad)
            for name, each in self._divided.items()
        }

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each whole parameter."""
        return {name: shape[0] for name, shape in self.shapes.items()}

    def take_gradients(self) -> None:
        """Move the gradients, already reduced, to `parameters`."""
        for name, parameter in self.parameters.items():
            whole = self._divided[name]
            if whole.grad is not None and parameter.numel():
                parameter.grad = whole.grad.to_local()
            whole.grad = None

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
            cast(Any, self.network).reshard()  # after a forward without a backward it may still be gathered

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
    """Give a network that one process has the memory layout of one that is divided, whose products round alike."""
    for parameter in network.parameters():  # `contiguous` keeps that of 1 × 1 convolutions
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).copy_(
            parameter.detach()
        )


def _make_uniform(parameters: list[nn.Parameter]) -> None:
    """Make parameters that are gathered together contiguous and of one dtype, as FSDP2 requires. No value changes."""
    wide = any(parameter.dtype == torch.float32 for parameter in parameters)
    for parameter in parameters:
        dtype = torch.float32 if wide else parameter.dtype
        parameter.data = parameter.data.to(dtype, memory_format=torch.contiguous_format)
