"""What the training loop asks of a task: parameters, batches on the accelerator, a loss."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..processes import Processes
from ..sharding import Shards

State = Mapping[str, Tensor]  # of the trained module, or of its average


class Inputs(Protocol):
    """A batch on the accelerator."""

    def tensors(self) -> Iterable[Tensor]:
        """Everything that lies there."""
        ...


class Task:
    """Something to train.

    trained           the module whose parameters the optimiser changes, in float32
    device            where it lies
    scale_loss        whether gradients come from fp16, in which small ones vanish unless the loss is scaled
    shards            the network's division among the processes, by which `trained` is this process's rows, or None
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
        """Divide the network among the processes (train.fsdp), before anything else is done with its parameters."""
        raise NotImplementedError

    def prepare(self, batch: Any, generator: torch.Generator) -> Inputs:
        """Bring a batch to the accelerator; runs in a thread of its own, ahead of the step."""
        raise NotImplementedError

    def loss(self, inputs: Any) -> dict[str, Tensor]:
        """Scalar terms by name: `loss` is minimised, the others are logged."""
        raise NotImplementedError

    def buffers(self) -> dict[str, Tensor]:
        """Further tensors that resuming needs."""
        return {}
