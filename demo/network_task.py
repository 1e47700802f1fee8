"""Task of the core's training loop that trains networks from random weights, on data drawn on the accelerator."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.training.settings import OutputSettings, TrainSettings
from cascade_nodes.cascade_core.training.tasks.base import Task
from cascade_nodes.demo.captured_loss import CapturedLoss, Loss, Terms


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that the loop reads."""

    train: TrainSettings
    output: OutputSettings

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Step(NamedTuple):
    """A step's number, from which its batch follows."""

    number: int

    def tensors(self) -> Iterator[Tensor]:
        return iter(())


class Steps:
    """Batches that only consist of the step's number until the step draws them."""

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Step:
        return Step(step)


class Batch(NamedTuple):
    """Arguments of the loss. rare: their shape is too rare to be worth compiling blocks for it."""

    tensors: Sequence[Tensor]
    rare: bool = False


class NetworkTask(Task):
    """Trains `networks` by loss(*tensors) of the batch that draw(step) gives.

    draw             draws all random numbers of a step; runs without gradients, in float32
    loss             of the drawn tensors alone, as `CapturedLoss` requires
    learning_rates   by network name, as a share of the settings', 1 where absent
    bf16             whether the loss runs under bf16 autocast
    graphs           whether passes are captured on a CUDA device
    """

    trained: nn.ModuleDict
    average_buffers = False  # a batch norm's statistics are averages already

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        draw: Callable[[int], Batch],
        loss: Loss,
        bf16: bool = True,
        learning_rates: Mapping[str, float] | None = None,
        graphs: bool = True,
    ):
        self.trained = nn.ModuleDict(networks).train()
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        self.device = parameters[0].device
        self.draw, self.loss_of_tensors, self.bf16 = draw, loss, bf16
        self.learning_rates = learning_rates or {}
        self.captured = CapturedLoss(self._autocast_loss, parameters)
        self.captured.eager |= not graphs

    def groups(self) -> list[dict[str, Any]]:
        return [
            {
                "params": [p for p in network.parameters() if p.requires_grad],
                "share": self.learning_rates.get(name, 1.0),
            }
            for name, network in self.trained.items()
        ]

    def prepare(self, batch: Step, generator: torch.Generator) -> Step:
        return batch

    def rehearse(self, tensors: Sequence[Tensor]) -> None:
        """Compiles and captures for a shape, with arbitrary values; the weights do not change."""
        if not self.captured.eager:
            self.captured(tensors)

    def loss(self, inputs: Step) -> Terms:
        with torch.no_grad():
            batch = self.draw(inputs.number)
        return self.captured(batch.tensors, batch.rare)

    def _autocast_loss(self, *tensors: Tensor) -> Terms:
        # Without autocast's cache, the weights' casts are part of what is captured.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            return self.loss_of_tensors(*tensors)
