"""One of several processes that train together, for `torchrun`: prints what came of each run, a line for each."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cascade_nodes.cascade_core.training import run
from cascade_nodes.cascade_core.training.loop import Loop
from cascade_nodes.headless.train import leave_group
from cascade_nodes.tests.core.training_runs import Dying, loop_of, settings_of


def state_of(loop: Loop) -> Tensor:
    """Everything that is trained, and what follows it, as one vector."""
    return torch.cat([value.double().flatten() for value in loop.task.trained.state_dict().values()])


def train(world: Path, name: str) -> None:
    def fresh(run: str) -> Loop:
        return loop_of(settings_of(world, name, world / f"{name} {run}"))

    whole = fresh("whole")
    began = state_of(whole).clone()
    whole.run()
    killed = fresh("killed")
    killed.data = Dying(killed.data, 5)
    with suppress(KeyboardInterrupt):
        killed.run()
    killed.accelerator.wait_for_everyone()
    resumed = fresh("killed")
    resumed.resume()
    resumed.run()
    mine = state_of(whole)
    everywhere = whole.accelerator.gather(mine[None])
    assert isinstance(everywhere, Tensor)
    if whole.accelerator.is_main_process:
        found = {
            "processes": whole.accelerator.num_processes,
            "moved": (mine - began).abs().max().item(),
            "between_processes": (everywhere - mine).abs().max().item(),
            "after_resuming": (state_of(resumed) - mine).abs().max().item(),
            "logged": [row["step"] for row in resumed.log.rows],
        }
        print(json.dumps(found), flush=True)  # noqa: T201


def train_twice(world: Path) -> None:
    """By `run.train`, as the command does: a whole run, and the same again. Prints what the main process was told."""
    settings = settings_of(world, "lora", world / "twice", train={"steps": 2})
    told: list[str] = []
    files = [run.train(settings, told.append).file for _ in range(2)]
    if told:
        print(json.dumps({"told": told, "files": [str(file) for file in files]}), flush=True)  # noqa: T201


if __name__ == "__main__":
    for task in sys.argv[2:]:
        train(Path(sys.argv[1]), task)
    train_twice(Path(sys.argv[1]))
    leave_group()
