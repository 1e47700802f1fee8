"""Two processes train as one, each with folders of its own as on two machines: killed or not, divided or not."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training.data import latents, text_cache
from cascade_nodes.cascade_core.training.data.latents import LatentEncoder
from cascade_nodes.cascade_core.training.state import STATE, rows_of
from cascade_nodes.tests.core.training_ranks import (
    DIVIDED,
    InTurn,
    digest,
    everything,
    note_encoded,
    seed_by_batch,
)
from cascade_nodes.tests.core.training_runs import loop_of, settings_of, write_world

TASKS = ["lora, adaptive", "controlnet from nothing"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of each of the two machines; the second has one picture to hold out fewer, and a folder without it."""
    first = write_world(tmp_path_factory.mktemp("first") / "world")
    shutil.copytree(first / "pictures", first / "held out")
    second = shutil.copytree(first, tmp_path_factory.mktemp("second") / "its own")
    shutil.copytree(first / "pictures", second / "without")
    (second / "without" / "3.png").unlink()
    (second / "held out" / "3.png").unlink()
    return first, second


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The finetunes by one process, which accumulates the batches of both; and the pictures that it encoded."""
    runs = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "ENCODED_AT_ONCE", 1)  # as `encode_one_by_one`
        patch.setattr(text_cache, "CHUNKS_AT_ONCE", 1)
        noted, encoded = note_encoded(LatentEncoder._encode)
        patch.setattr(LatentEncoder, "_encode", noted)
        loops = {name: accumulating(world[0], name, runs / name) for name in DIVIDED}
    shutil.rmtree(world[0] / "cache")  # the two processes encode anew
    return loops, encoded


def accumulating(world, name, run):
    sections = {**DIVIDED[name], "train": {**DIVIDED[name]["train"], "accumulate": 2}}
    loop = seed_by_batch(loop_of(settings_of(world, name, run, **sections)))
    loop.data = InTurn(loop.data)
    loop.run()
    loop.task.write(loop.state, run / "out.safetensors", {})
    return loop


@pytest.fixture(scope="module")
def outcomes(world, alone, tmp_path_factory):
    """What came of each run, of both processes."""
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    running = []
    for rank, own in enumerate(world):
        run = shutil.copytree(alone[0]["finetune"].folder.parent, own / "alone")
        several = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        several |= {"MASTER_ADDR": "they meet in a file", "MASTER_PORT": "0"}
        environment = {**os.environ, **several, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "cascade_nodes.tests.core.training_ranks", str(own), str(run)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*command, str(meeting), *TASKS], env=environment, **pipes))
    found = []
    for process in running:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        found.append({line["name"]: line for line in lines})
    return found


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_agree_and_resume_bit_for_bit(outcomes, name):
    first, second = (outcome[name] for outcome in outcomes)
    assert first["moved"] > 1e-3
    assert first["whole"] == second["whole"] == first["resumed"] == second["resumed"]
    assert first["resumed_at"] == second["resumed_at"] == 3
    assert first["logged"] == [2, 4, 6, 8]
    assert (first["files"], second["files"]) == ([STATE], [])  # the second was told


def test_two_processes_leave_a_finished_run_as_it_is(outcomes):
    """The main one alone has the folder's lock and compares its state; both end."""
    told, (first, again) = outcomes[0]["twice"]["told"], outcomes[0]["twice"]["files"]
    assert told[-2].startswith(f"Wrote {first}: a LoRA of rank 16 of ")
    assert told[-1].startswith("The run is finished, at step 2")
    assert first == again
    assert outcomes[1]["twice"]["told"] == []


@pytest.mark.parametrize("task", DIVIDED)
def test_a_divided_network_trains_as_a_whole_one_bit_for_bit(outcomes, alone, world, task):
    """Weights, average, optimiser, samples and the file: two processes with their rows, and one that has all."""
    whole = everything(alone[0][task])
    for rank, own in enumerate(world):
        rows, _ = read_safetensors(own / f"divided {task} whole" / "everything.safetensors")
        for name, value in whole.items():
            start, end = rows_of(len(value), rank, 2) if value.ndim else (0, 0)
            expected = value[start:end] if value.ndim else value
            if name in rows:
                assert torch.equal(rows[name], expected), name
            else:  # the optimiser's, of a tensor of a single row, which is the first process's
                assert name.startswith("optimiser.")
                assert len(expected) == 0 if value.ndim else rank == 1
    run = world[0] / f"divided {task} whole"
    assert validated(run) == validated(alone[0][task].folder)
    for name in ("out.safetensors", "samples/000000.png", "samples/000008.png"):
        assert (run / name).read_bytes() == (alone[0][task].folder / name).read_bytes(), name
    assert not (world[1] / f"divided {task} whole" / "out.safetensors").exists()


def validated(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    errors = [row["validation"] for row in rows if "validation" in row]
    assert len(errors) == 3  # at steps 0, 4 and 8
    return errors


def test_each_picture_is_encoded_by_one_of_the_processes(outcomes, alone):
    """Stage C's latents, Stage A's, the compressor's of each size, and those of held-out pictures."""
    shares = [outcome["encoded"]["pictures"] for outcome in outcomes]
    assert sorted(shares[0] + shares[1]) == sorted(alone[1])
    networks = [Counter(line.split(" (")[0] for line in share) for share in shares]
    expected = {"semantic compressor": 5, "Stage A": 5, "compressor": 4}  # of ten pictures, two held out
    assert networks == [expected, expected]


@pytest.mark.parametrize("task", DIVIDED)
def test_a_divided_run_that_was_killed_goes_on_bit_for_bit(outcomes, task):
    """Each process goes on from its own part of the state, which lies in its own folder alone."""
    for rank, outcome in enumerate(outcomes):
        found = outcome[f"divided {task}"]
        assert found["resumed_at"] == 3
        assert found["whole"] == found["resumed"]
        parts = [name for name in found["files"] if name != STATE]
        assert [part.endswith(f".{rank}-of-2.safetensors") for part in parts] == [True]
        assert (STATE in found["files"]) == (rank == 0)


@pytest.mark.parametrize("task", DIVIDED)
def test_another_number_of_processes_goes_on_with_a_divided_run(outcomes, alone, world, tmp_path, task):
    for outcome in outcomes:
        assert outcome[f"divided {task}"]["of_one"] == outcome[f"divided {task}"]["whole"]
    for own in world:
        shutil.copytree(own / f"divided {task} whole", tmp_path / "run", dirs_exist_ok=True)
    loop = loop_of(settings_of(world[0], task, tmp_path / "run", **DIVIDED[task]))
    assert loop.resume()
    assert digest(everything(loop)) == digest(everything(alone[0][task]))
    loop.save()
    assert [path.name for path in (tmp_path / "run").glob("state.*")] == [STATE]


def test_processes_that_would_train_something_else_are_told_what_and_where(outcomes):
    """They are told before anything is loaded, both in the same words."""
    first, second = (outcome["refused"] for outcome in outcomes)
    assert first == second
    where = f"Process 1 of 2, on {socket.gethostname()}"
    end = "; give all of them the same settings, pictures and networks."
    assert first["seed"] == f"{where}, would train something else than process 0 (train.seed: 0 → 7){end}"
    assert first["steps"] == f"{where}, would train something else than process 0 (train.steps: 2 → 3){end}"
    assert (
        first["epochs"]
        == f"{where}, would train something else than process 0 (train.epochs: null → 1.0){end}"
    )
    assert "(validation.every: 0 → 1)" in first["validation"]
    assert re.search(r"\(held-out pictures: 10 pictures \(.*\) → 9 pictures \(.*\)\)", first["held out"])
    assert re.search(r"\(pictures and captions: 10 pictures \(.*\) → 9 pictures \(.*\)\)", first["pictures"])
    assert first["network"].startswith(f"{where}: nothing.safetensors")
