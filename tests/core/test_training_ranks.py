"""Two processes train as one: the same weights in both at every step, killed or not."""

import json
import os
import subprocess
import sys

import pytest

from cascade_nodes.tests.core.training_runs import write_world


@pytest.mark.parametrize("name", ["lora", "controlnet from nothing"])
def test_two_processes_agree_and_resume_bit_for_bit(tmp_path, name):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [
            sys.executable,
            *command,
            "-m",
            "cascade_nodes.tests.core.training_ranks",
            str(write_world(tmp_path)),
            name,
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["processes"] == 2
    assert found["moved"] > 1e-3
    assert found["between_processes"] == 0
    assert found["after_resuming"] == 0
    assert found["logged"] == [2, 4, 6, 8]
