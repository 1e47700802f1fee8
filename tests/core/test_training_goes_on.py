"""A run resumes only if everything that decides its result is unchanged; a finished one is left as it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.training.identity import network_digest
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.run_folder import LOCK, locked
from cascade_nodes.cascade_core.training.settings import Settings
from cascade_nodes.cascade_core.training.state import STATE, read_state
from cascade_nodes.tests.core.training_runs import loop_of, settings_of, with_steps, write_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A world with a run of two steps that came to its end."""
    world = write_world(tmp_path_factory.mktemp("world"))
    train(changed(world, world / "run"))
    return world


@pytest.fixture
def world(finished, tmp_path):
    """A copy of the finished world, with its files as old as they were."""
    return Path(shutil.copytree(finished, tmp_path / "world"))


def changed(world: Path, run: Path, name: str = "lora", **sections) -> Settings:
    train = {"steps": 2, "warmup": 0, **sections.pop("train", {})}
    return settings_of(world, name, run, train=train, **sections)


def run_again(settings: Settings, **options) -> list[str]:
    """The sentences of another run."""
    told: list[str] = []
    train(settings, told.append, **options)
    return told


def refusal(settings: Settings) -> str:
    with pytest.raises(CascadeError) as error:
        train(settings)
    return str(error.value)


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    settings = changed(finished, tmp_path)
    train(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    file = Path(settings.output.file)
    assert run_again(settings) == [
        f"The run is finished, at step 2, and its result is {file}. Give more train.steps to go on, or --fresh to "
        "begin anew."
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before

    tensors = read_safetensors(file)[0]
    tensors = {name: value.clone() for name, value in tensors.items()}
    file.unlink()  # then it is written anew, without a step
    assert run_again(settings)[-1].startswith(f"Wrote {file}: a LoRA ")
    again = read_safetensors(file)[0]
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)

    other = changed(finished, tmp_path, lora={"dialect": "comfyui"})
    assert "as comfyui writes it" in run_again(other)[-1]
    assert read_adapter(file).dialect == "comfyui"


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"train": {"learning_rate": 1e-2}}, "train.learning_rate 0.003 → 0.01"),
        ({"train": {"seed": 1}}, "train.seed 0 → 1"),
        ({"train": {"ema": 0.0}}, "train.ema 0.5 → 0.0"),
        ({"lora": {"rank": 3, "alpha": 16.0}}, "lora.rank 16 → 3"),
        ({"objective": {"weighting": "debiased"}}, "objective.weighting p2 → debiased"),
        ({"data": {"size": 96}}, "data.size 64 → 96"),
        ({"data": {"caption_dropout": 0.5}}, "data.caption_dropout 0.05 → 0.5"),
    ],
)
def test_other_settings_are_refused_by_name(finished, section, sentence):
    path = finished / "run" / STATE
    assert refusal(changed(finished, finished / "run", **section)) == (
        f"{path} is of a run with other settings ({sentence}); put them back, or begin anew with --fresh."
    )


def test_other_pictures_captions_and_networks_are_refused(world):
    settings = changed(world, world / "run")
    caption = world / "pictures" / "0.txt"
    words = caption.read_text()
    caption.write_text("another")
    assert "(pictures and captions 10 pictures (" in refusal(settings)
    caption.write_text(words)
    shutil.copy(world / "pictures" / "1.png", world / "pictures" / "0.png")
    assert "(pictures and captions 10 pictures (" in refusal(settings)
    # What samples show decides nothing.
    shutil.copy(settings.models.compressor, settings.models.previewer or "")
    tensors, metadata = read_safetensors(settings.models.stage_c)
    tensors = {name: value.clone() for name, value in tensors.items()}
    next(iter(tensors.values())).flatten()[-1] += 1
    write_safetensors(Path(settings.models.stage_c), tensors, metadata)
    assert "models.stage_c file " in refusal(settings)


def test_what_decides_nothing_may_change(world):
    """Places, dates, the cache, samples and the way of computing decide nothing."""
    moved = Path(shutil.copytree(world, world.parent / "elsewhere", copy_function=shutil.copyfile))
    for path in (moved / "run").glob("*.safetensors"):
        os.utime(path)
    settings = changed(
        moved, moved / "run", train={"compile": True, "gradient_checkpointing": True}, output={"log_every": 7}
    )
    settings = replace(settings, data=replace(settings.data, cache=str(moved / "new cache")))
    (told,) = run_again(
        replace(settings, output=replace(settings.output, file=str(world / "run/out.safetensors")))
    )[-1:]
    assert told.startswith("Wrote ")


def test_more_steps_go_on_and_fewer_are_said(world):
    settings = changed(world, world / "run")
    assert refusal(with_steps(settings, 1)) == (
        f"{world / 'run' / STATE} is at step 2, but train.steps is 1, and a run does not go back; give at least 2, or "
        "begin anew with --fresh."
    )
    told = run_again(with_steps(settings, 4))
    assert told[0] == (
        "train.steps was 2 and is 4 now; from here on the learning rate follows the cosine of 4 steps, so the result "
        "is not that of a run of 4 steps from its beginning."
    )
    assert told[-1].startswith("Wrote ")
    assert run_again(changed(world, world / "run", train={"seed": 1}), fresh=True)[-1].startswith("Wrote ")


def rewrite(world: Path, change) -> None:
    """Changes a state's parts or its metadata."""
    tensors, metadata = read_safetensors(world / "run" / STATE)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors, metadata)
    write_safetensors(world / "run" / STATE, tensors, metadata)


def test_a_state_of_an_earlier_version_goes_on_with_a_notice(world):
    rewrite(world, lambda tensors, metadata: metadata.pop("contents"))
    told = run_again(with_steps(changed(world, world / "run"), 3))
    assert told[0] == (
        f"{world / 'run' / STATE} is of an earlier version and does not tell its pictures and networks; they are "
        "taken as given."
    )
    assert "contents" in read_state(world / "run" / STATE)[1]
    rewrite(world, lambda tensors, metadata: metadata.pop("contents"))
    assert "(train.seed 0 → 1)" in refusal(changed(world, world / "run", train={"seed": 1, "steps": 3}))


DAMAGED = [
    (
        lambda tensors, metadata: metadata.update(step="soon"),
        "states 'soon' as its step, which is not a number",
    ),
    (lambda tensors, metadata: metadata.pop("step"), "states '' as its step"),
    (lambda tensors, metadata: tensors.update(other=torch.ones(1)), "holds 'other', which is not a part of"),
    (
        lambda tensors, metadata: tensors["trained.stage_c.vector"].fill_(torch.nan),
        "holds NaN or infinity in 'trained.stage_c.vector'",
    ),
    (
        lambda tensors, metadata: tensors.update({"trained.stage_c.vector": torch.ones(3)}),
        "was written with other settings of what is trained",
    ),
    (
        lambda tensors, metadata: tensors.update({"optimiser.7.step": torch.tensor(1.0)}),
        "holds 'optimiser.7.step', which is of another optimiser or parameter",
    ),
    (
        lambda tensors, metadata: tensors.update({"optimiser.x": torch.ones(1)}),
        "holds 'optimiser.x', which is of",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), DAMAGED, ids=[sentence for _, sentence in DAMAGED])
def test_a_damaged_state_is_a_sentence(world, change, sentence):
    rewrite(world, change)
    told = refusal(with_steps(changed(world, world / "run"), 3))
    assert sentence in told
    assert told.endswith("begin anew with --fresh.")


def test_a_state_that_was_cut_is_a_sentence(world):
    path = world / "run" / STATE
    path.write_bytes(path.read_bytes()[:-1000])
    told = refusal(changed(world, world / "run"))
    assert told.startswith(f"{path} is truncated: ")
    assert told.endswith("begin anew with --fresh.")
    rewrite_metadata = {"step": "2", "settings": "[" * 100_000, "contents": "{"}
    write_safetensors(path, {"trained.x": torch.ones(1)}, rewrite_metadata)
    assert refusal(with_steps(changed(world, world / "run"), 3)).endswith("begin anew with --fresh.")


def test_weights_that_diverge_leave_the_last_good_state(finished, tmp_path):
    loop = loop_of(
        changed(finished, tmp_path, train={"steps": 6}, output={"log_every": 9, "checkpoint_every": 1})
    )
    data = loop.data

    class Diverging:
        def batch(self, step, batch_size, rank=0, ranks=1):
            batch = data.batch(step, batch_size, rank, ranks)
            return replace(batch, latents=batch.latents * torch.nan) if step == 3 else batch

    loop.data = Diverging()
    with pytest.raises(
        CascadeError, match=r"stage_c.vector holds NaN or infinity after step 4, .* Lower train.learning_rate"
    ):
        loop.run()
    assert read_state(tmp_path / STATE)[1]["step"] == "3"
    assert loop_of(changed(finished, tmp_path)).resume()


def test_two_runs_in_one_folder(finished):
    """They may also be in two processes; a kill leaves nothing that blocks."""
    run = finished / "run"
    settings = changed(finished, run)
    sentence = (
        f"Another training runs in {run}; wait for its end, or give this one an output.folder of its own."
    )
    with locked(run, print):
        assert refusal(settings) == sentence
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert refusal(settings) == sentence
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert run_again(settings)[0].startswith("The run is finished")
    assert json.loads(read_state(run / STATE)[1]["contents"])["processes"] == "1"


def test_a_pipe_in_a_networks_place_blocks_nothing(tmp_path):
    pipe = tmp_path / "stage_c.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(CascadeError, match="it is a pipe or a device"):
        network_digest(pipe, "stage_c", lambda: None)
