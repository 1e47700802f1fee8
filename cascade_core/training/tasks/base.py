"""Interface between the training loop and a task: parameters, batches on the accelerator, a loss."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..processes import Processes
from ..sharding import Shards

State = Mapping[str, Tensor]  # values of the trained module, or their average


class Inputs(Protocol):
    """A batch on the accelerator."""

    def tensors(self) -> Iterable[Tensor]:
        """All tensors of the batch on the accelerator."""
        ...


class Task:
    """Something to train.

    trained           the module whose parameters the optimiser changes, in float32
    device            the device of that module
    scale_loss        whether gradients are computed in fp16, where small ones vanish unless the loss is scaled
    shards            the network's division among processes, where `trained` holds this process's rows; else None
    average_buffers   whether the average of the weights averages buffers too (batch norms' statistics), or copies them
    """

    trained: nn.Module
    device: torch.device
    scale_loss = False
    shards: Shards | None = None
    average_buffers = True

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; `share` is of the learning rate."""
        return [{"params": [p for p in self.trained.parameters() if p.requires_grad]}]

    def divide(self, processes: Processes) -> None:
        """Divides the network among the processes (train.fsdp); called before any other use of its parameters."""
        raise NotImplementedError

    def prepare(self, batch: Any, generator: torch.Generator) -> Inputs:
        """Copies a batch to the accelerator; runs in a separate thread, ahead of the step."""
        raise NotImplementedError

    def loss(self, inputs: Any) -> dict[str, Tensor]:
        """Scalar terms by name: `loss` is minimised, the others are logged."""
        raise NotImplementedError

    def buffers(self) -> dict[str, Tensor]:
        """Further tensors that resuming needs."""
        return {}
