"""One of several processes that train together, each as if on a machine of its own: prints what came of each run."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.training import run, sharding
from cascade_nodes.cascade_core.training.data import latents, text_cache
from cascade_nodes.cascade_core.training.data.buckets import Bucket
from cascade_nodes.cascade_core.training.data.latents import LatentEncoder
from cascade_nodes.cascade_core.training.loop import Loop
from cascade_nodes.cascade_core.training.settings import Settings, ValidationSettings
from cascade_nodes.cascade_core.training.state import optimiser_tensors
from cascade_nodes.headless.train import leave_group
from cascade_nodes.tests.core.training_runs import Dying, loop_of, settings_of

_WHOLE: dict[str, Any] = {  # a whole finetune by FSDP2, with samples and held-out pictures
    "train": {"fsdp": True, "max_grad_norm": 0.5, "gradient_checkpointing": True},
    "output": {"sample_every": 4, "prompts": ["a red star"], "sample_steps": 2},
    "validation": {"every": 4, "share": 0.2, "times": 2},
}
DIVIDED: dict[str, dict[str, Any]] = {  # by their tasks; Stage B without what each process draws by itself
    "finetune": {**_WHOLE, "train": {**_WHOLE["train"], "precision": "bf16"}},
    "finetune of stage b": {**_WHOLE, "stage_b": {"scales": [0.75], "noise": 0.0, "dropout": 0.0}},
}


def everything(loop: Loop) -> dict[str, Tensor]:
    """All that a run ends with; of a network that is divided, this process's rows."""
    tensors = {f"trained.{name}": value.clone() for name, value in loop.task.trained.state_dict().items()}
    tensors |= {f"run.{name}": value.clone() for name, value in loop.state.items()}
    tensors |= {f"optimiser.{name}": value for name, value in optimiser_tensors(loop.optimiser).items()}
    return tensors | {f"buffers.{name}": value.clone() for name, value in loop.task.buffers().items()}


def digest(tensors: dict[str, Tensor]) -> str:
    total = blake2b(digest_size=16)
    for name in sorted(tensors):
        total.update(
            name.encode() + tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def seed_by_batch(loop: Loop) -> Loop:
    """What is drawn at random follows from the batch alone, so that it is the same whoever trains it."""
    loss: Callable[[Any], dict[str, Tensor]] = loop.task.loss

    def seeded(inputs: Any) -> dict[str, Tensor]:
        torch.manual_seed(int.from_bytes(blake2b(inputs.latents.numpy().tobytes(), digest_size=7).digest()))
        return loss(inputs)

    loop.task.loss = seeded
    return loop


class InTurn:
    """For one process that accumulates two batches: those that two processes have at a step."""

    def __init__(self, data: Any):
        self.data = data

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Any:
        return self.data.batch(step // 2, batch_size, step % 2, 2)


def encode_one_by_one() -> None:
    """A picture's latent and a caption's states have the same bits then, whatever else their process has to encode."""
    latents.ENCODED_AT_ONCE = text_cache.CHUNKS_AT_ONCE = 1


def note_encoded(encode: Callable[..., Tensor]) -> tuple[Any, list[str]]:
    """LatentEncoder._encode, and a list of what it is called with: network, size and pixels of each picture."""
    encoded: list[str] = []

    def noted(encoder: LatentEncoder, images: list[Tensor], bucket: Bucket) -> Tensor:
        for image in images:
            pixels = blake2b(image.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
            encoded.append(f"{encoder.form.network} {tuple(image.shape)} {pixels}")
        return encode(encoder, images, bucket)

    return noted, encoded


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201


def train(world: Path, name: str) -> None:
    """A whole run, and one that is killed and goes on, of whose state the main process's folder alone has a copy."""

    def fresh(run: str) -> Loop:
        return loop_of(settings_of(world, name, world / f"{name} {run}"))

    answer({"name": name, **killed_and_whole(fresh)})


def killed_and_whole(fresh: Callable[[str], Loop]) -> dict[str, Any]:
    whole = fresh("whole")
    began = everything(whole)
    whole.run()
    killed = fresh("killed")
    killed.data = Dying(killed.data, 5 * killed.settings.train.accumulate)
    with suppress(KeyboardInterrupt):
        killed.run()
    killed.processes.wait()
    resumed = fresh("killed")
    assert resumed.resume()
    step = resumed.step
    resumed.run()
    end = everything(whole)
    return {
        "moved": max(float((end[name] - began[name]).abs().sum()) for name in end if name in began),
        "whole": digest(end),
        "resumed_at": step,
        "resumed": digest(everything(resumed)),
        "logged": [row["step"] for row in resumed.log.rows] if resumed.processes.is_main_process else None,
        "files": sorted(path.name for path in resumed.folder.glob("state.*")),
    }


def divided(world: Path, name: str, alone: Path) -> None:
    """A finetune of a network that is divided; and from the state that one process left in `alone`."""

    def fresh(run: str) -> Loop:
        return seed_by_batch(
            loop_of(settings_of(world, name, world / f"divided {name} {run}", **DIVIDED[name]))
        )

    found = killed_and_whole(fresh)
    whole = fresh("whole")
    assert whole.resume()
    whole.task.write(whole.state, whole.folder / "out.safetensors", {})
    write_safetensors(whole.folder / "everything.safetensors", everything(whole), {})
    folder = alone / name if whole.processes.is_main_process else world / "nothing"
    of_one = loop_of(settings_of(world, name, folder, **DIVIDED[name]))
    assert of_one.resume()
    answer({"name": f"divided {name}", **found, "of_one": digest(everything(of_one))})


def train_twice(world: Path) -> None:
    """By `run.train`, as the command does: a whole run, and the same again; then runs that the processes differ in."""
    settings = settings_of(world, "lora", world / "twice", train={"steps": 2})
    told: list[str] = []
    files = [str(run.train(settings, told.append).file) for _ in range(2)]
    answer({"name": "twice", "told": told, "files": files})
    second = os.environ["RANK"] == "1"

    def refusal(changed: Settings, settings: Settings = settings) -> str:
        try:
            run.train(changed if second else settings, fresh=True)
        except CascadeError as error:
            return str(error)
        return ""

    without = Path(settings.data.folder or "").with_name("without")
    held_out = replace(settings, validation=ValidationSettings(every=1, folder=str(world / "held out")))
    changes = {
        "seed": replace(settings, train=replace(settings.train, seed=7)),
        "steps": replace(settings, train=replace(settings.train, steps=3)),
        "pictures": replace(settings, data=replace(settings.data, folder=str(without))),
        "epochs": replace(settings, train=replace(settings.train, epochs=1.0)),
        "validation": held_out,
        "network": replace(settings, models=replace(settings.models, stage_c="nothing.safetensors")),
    }
    refusals = {name: refusal(changed) for name, changed in changes.items()}
    refusals["held out"] = refusal(held_out, held_out)
    answer({"name": "refused", **refusals})


if __name__ == "__main__":
    world, alone, meeting = (Path(argument) for argument in sys.argv[1:4])
    torch.distributed.init_process_group(
        "gloo", f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    encode_one_by_one()
    LatentEncoder._encode, encoded = note_encoded(LatentEncoder._encode)
    sharding.UNIT = 60_000  # so that a level has several units, of several blocks
    for task in sys.argv[4:]:
        train(world, task)
    for task in DIVIDED:
        divided(world, task, alone)
    answer({"name": "encoded", "pictures": encoded})
    train_twice(world)
    leave_group()
