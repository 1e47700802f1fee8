"""What runs, what does not run again, what is heard of it meanwhile, and how it stops."""

import os
import shutil

import numpy as np
import pytest

from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.tests.comfyui.graphs import DECODER, PRIOR, demo, tiny


def test_same_inputs_never_run_twice(client):
    graph = tiny({"7.seed": 100})
    first = client.run(graph)
    assert first.error is None
    again = client.run(graph)
    assert sorted(again.cached) == sorted(graph)
    assert again.executed == []


def test_what_changed_runs_and_what_follows_from_it(client):
    client.run(tiny({"7.seed": 101}))
    execution = client.run(tiny({"7.seed": 101, "8.seed": 5}))
    assert execution.executed == ["8", "9", "10"]
    assert sorted(execution.cached) == ["1", "2", "3", "4", "5", "6", "7"]
    prompt = client.run(tiny({"7.seed": 101, "8.seed": 5, "5.positive": "a blue circle"}))
    assert sorted(prompt.executed) == ["10", "5", "7", "8", "9"]


def test_a_replaced_file_runs_again(client, server, right_picture):
    """The new file is put in place while the old one is loaded, as a download does it; then the old one comes back."""
    graph = tiny({"7.seed": 102})
    (before,) = client.pictures(client.run(graph))
    file = server.base / "models" / "diffusion_models" / "tiny_stage_c.safetensors"
    backup = file.with_name("kept")
    shutil.copy(file, backup)
    tensors, metadata = read_safetensors(file)
    changed = {name: tensor * 1.5 if name.endswith("weight") else tensor for name, tensor in tensors.items()}
    write_safetensors(file, changed, metadata)
    execution = client.run(graph)
    assert execution.error is None
    assert sorted(execution.executed) == ["1", "10", "7", "8", "9"]
    (after,) = client.pictures(execution)
    assert np.abs(after.astype(int) - before).max() > 1
    os.replace(backup, file)
    execution = client.run(graph)
    assert "7" in execution.executed
    (restored_picture,) = client.pictures(execution)
    assert np.abs(restored_picture.astype(int) - right_picture(graph)).max() <= 1


def test_progress_and_previews_arrive(client):
    execution = client.run(tiny({"7.seed": 103, "7.steps": 6, "8.steps": 5}))
    assert execution.error is None
    for sampler, steps in ((PRIOR, 6), (DECODER, 5)):
        values = [
            data["value"] for data in execution.of("progress") if data["node"] == sampler and data["value"]
        ]
        # Newer versions leave out some that follow each other too closely.
        assert values == sorted(set(values))
        assert (values[0], values[-1]) == (1, steps)
        assert {data["max"] for data in execution.of("progress") if data["node"] == sampler} == {steps}
    assert 2 <= len(execution.previews) <= 6 + 5  # each sampler's first at once
    for sampler, steps in ((PRIOR, 6), (DECODER, 5)):
        (preview,) = [
            data["output"]["cascade_run"] for data in execution.of("executed") if data["node"] == sampler
        ]
        assert preview[0]["steps"] == steps


@pytest.mark.parametrize("sampler", [PRIOR, DECODER])
def test_interrupt_stops_within_one_step(client, right_picture, sampler):
    slow = {"7.seed": 7, "7.steps": 20 if sampler == PRIOR else 1, "8.steps": 20}  # some 100 ms a step
    values, heard = [], []

    def stop_at_the_second(kind, data):
        if kind == "progress" and data["node"] == sampler:
            values.append(data["value"])
            if data["value"] >= 2 and not heard:  # newer versions leave out some
                heard.append(data["value"])
                client.post("/interrupt", {})

    execution = client.follow(client.queue(demo(slow)), stop_at_the_second)
    (interrupted,) = execution.of("execution_interrupted")
    assert interrupted["node_id"] == sampler
    assert max(values) <= heard[0] + 1
    assert execution.error is None
    graph = tiny({"7.seed": 104})
    (picture,) = client.pictures(client.run(graph))
    assert np.abs(picture.astype(int) - right_picture(graph)).max() <= 1
