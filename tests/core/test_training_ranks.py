"""Two processes train as one: the same weights in both at every step, killed or not."""

import json
import os
import subprocess
import sys

import pytest

from cascade_nodes.tests.core.training_runs import write_world

TASKS = ["lora", "controlnet from nothing"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each of TASKS, trained one after the other by the same two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    world = write_world(tmp_path_factory.mktemp("world"))
    finished = subprocess.run(
        [*command, "-m", "cascade_nodes.tests.core.training_ranks", str(world), *TASKS],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    names = [*TASKS, "twice"]
    lines = finished.stdout.splitlines()[-len(names) :]
    return {name: json.loads(line) for name, line in zip(names, lines, strict=True)}


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_agree_and_resume_bit_for_bit(outcomes, name):
    outcome = outcomes[name]
    assert outcome["processes"] == 2
    assert outcome["moved"] > 1e-3
    assert outcome["between_processes"] == 0
    assert outcome["after_resuming"] == 0
    assert outcome["logged"] == [2, 4, 6, 8]


def test_two_processes_leave_a_finished_run_as_it_is(outcomes):
    """The main one alone has the folder's lock and compares its state; both end."""
    told, (first, again) = outcomes["twice"]["told"], outcomes["twice"]["files"]
    assert told[-2].startswith(f"Wrote {first}: a LoRA of rank 16 of ")
    assert told[-1].startswith("The run is finished, at step 2")
    assert first == again
