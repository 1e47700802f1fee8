"""Networks trained from nothing as a task of the core's training loop, on data that lies on the accelerator."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.training.data.epochs import generator
from cascade_nodes.cascade_core.training.settings import OutputSettings, TrainSettings
from cascade_nodes.cascade_core.training.tasks.base import Task


@dataclass(frozen=True)
class RunSettings:
    """What the loop reads of a run's settings."""

    train: TrainSettings
    output: OutputSettings

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Rows(NamedTuple):
    """A batch: indices of the data's rows, (B,) int64 on the accelerator."""

    rows: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield self.rows


class RandomRows:
    """Batches of random rows, out of `count`, with replacement."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.seed = count, seed

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Tensor:
        random = generator(self.seed, "rows", step * ranks + rank)
        return torch.randint(self.count, (batch_size,), generator=random)


class NetworkTask(Task):
    """Trains `networks` by loss(rows), where rows (B,) are those of the batch.

    learning_rates   by network name, as a share of the settings', 1 where absent
    bf16             whether the loss runs under bf16 autocast
    """

    trained: nn.ModuleDict
    average_buffers = False  # a batch norm's statistics are an average already

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        loss: Callable[[Tensor], dict[str, Tensor]],
        bf16: bool = True,
        learning_rates: Mapping[str, float] | None = None,
    ):
        self.trained = nn.ModuleDict(networks).train()
        self.device = next(self.trained.parameters()).device
        self.loss_of_rows, self.bf16 = loss, bf16
        self.learning_rates = learning_rates or {}

    def groups(self) -> list[dict[str, Any]]:
        return [
            {
                "params": [p for p in network.parameters() if p.requires_grad],
                "share": self.learning_rates.get(name, 1.0),
            }
            for name, network in self.trained.items()
        ]

    def prepare(self, batch: Tensor, generator: torch.Generator) -> Rows:
        return Rows(batch.to(self.device))

    def loss(self, inputs: Rows) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss_of_rows(inputs.rows)
