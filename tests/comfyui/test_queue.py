"""Prompts queued, interrupted and deleted in any order: the server leaks no memory and makes the right pictures."""

import random
from pathlib import Path

import numpy as np
import pytest

from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.comfyui.queueing import Queue, free

SEQUENCES = 15
LONG_SEQUENCES = 50
WARM_UP = 40
STEPS = {"7.steps": 12, "8.steps": 8}  # some tenths of a second in all, so that cancelling meets it anywhere


def graph(seed):
    return tiny({**STEPS, "7.seed": seed, "8.seed": seed})


def check(client, right_picture, seed):
    """Asserts that a prompt that was cancelled half-way gives the right picture the next time."""
    execution = client.run(graph(seed))
    assert execution.error is None
    assert execution.of("execution_success")
    if execution.executed:
        (picture,) = client.pictures(execution)
        assert np.abs(picture.astype(int) - right_picture(graph(seed)).astype(int)).max() <= 1


@pytest.fixture
def queue(client):
    return Queue(client, graph)


ORDERS = ["AaBb", "ABab", "ABba", "AaB", "ABa", "ABb"]


@pytest.mark.parametrize("order", ORDERS)
def test_two_prompts_cancelled_in_every_order(client, queue, right_picture, order):
    """A and B stand for queuing two prompts, a and b for cancelling them."""
    seeds = {letter: 2000 + 10 * ORDERS.index(order) + place for place, letter in enumerate("AB")}
    prompts = {}
    for event in order:
        if event in seeds:
            prompts[event] = queue.queue(seeds[event])
        else:
            queue.cancel(prompts[event.upper()])
    queue.wait()
    statuses = {
        letter: client.server.get(f"/history/{prompt_id}")
        .get(prompt_id, {})
        .get("status", {})
        .get("status_str")
        for letter, prompt_id in prompts.items()
    }
    assert all(statuses[letter] == "success" for letter in prompts if letter.lower() not in order), statuses
    for seed in seeds.values():
        check(client, right_picture, seed)


def resident_bytes(client):
    """Host memory of the server, once it was asked to let go of what it can."""
    free(client)
    status = Path(f"/proc/{client.server.process.pid}/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_random_sequences(client, queue, right_picture, seed):
    for number in range(SEQUENCES):
        check(client, right_picture, queue.play(random.Random(100 * seed + number))[-1])
        assert client.server.process.poll() is None


@pytest.mark.nightly
def test_random_sequences_leave_nothing_behind(client, queue, right_picture):
    for number in range(WARM_UP):
        check(client, right_picture, queue.play(random.Random(-1 - number))[-1])
    before = resident_bytes(client)
    for number in range(LONG_SEQUENCES):
        check(client, right_picture, queue.play(random.Random(number))[-1])
        assert client.server.process.poll() is None
    after = resident_bytes(client)
    print(f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after")  # noqa: T201
    assert after <= before * 1.01
