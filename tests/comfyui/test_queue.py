"""Prompts queued, interrupted and deleted in any order: the server stays up, keeps no memory, paints what is right."""

import random
import time
from pathlib import Path

import numpy as np
import pytest

from cascade_nodes.tests.comfyui.graphs import tiny

SEQUENCES = 50
WARM_UP = 40
STEPS = {"7.steps": 12, "8.steps": 8}  # some tenths of a second in all, so that cancelling meets it anywhere


class Queue:
    """A server's queue as one tab sees it: prompts go by the number of their graph."""

    def __init__(self, client):
        self.client = client
        self.prompts: list[str] = []

    def queue(self, seed):
        self.prompts.append(self.client.queue(graph(seed)))

    def cancel(self, prompt_id):
        """Interrupts it where it runs, deletes it where it waits, does nothing where it is done."""
        running, pending = self.state()
        if prompt_id in running:
            self.client.post("/interrupt", {})
        elif prompt_id in pending:
            self.client.post("/queue", {"delete": [prompt_id]})

    def state(self):
        """(running, pending), ids of prompts."""
        state = self.client.server.get("/queue")
        return [[entry[1] for entry in state[f"queue_{kind}"]] for kind in ("running", "pending")]

    def wait(self):
        """Until nothing runs or waits."""
        deadline = time.monotonic() + 60
        while any(self.state()):
            assert time.monotonic() < deadline, "the queue does not come to an end"
            time.sleep(0.01)


def graph(seed):
    return tiny({**STEPS, "7.seed": seed, "8.seed": seed})


def check(client, right_picture, seed):
    """What was cancelled half-way is made whole the next time."""
    execution = client.run(graph(seed))
    assert execution.error is None
    assert execution.of("execution_success")
    if execution.executed:
        (picture,) = client.pictures(execution)
        assert np.abs(picture.astype(int) - right_picture(graph(seed)).astype(int)).max() <= 1


@pytest.fixture
def queue(client):
    return Queue(client)


ORDERS = ["AaBb", "ABab", "ABba", "AaB", "ABa", "ABb"]


@pytest.mark.parametrize("order", ORDERS)
def test_two_prompts_cancelled_in_every_order(client, queue, right_picture, order):
    """A and B are queued, a and b are cancelled."""
    seeds = {letter: 2000 + 10 * ORDERS.index(order) + place for place, letter in enumerate("AB")}
    prompts = {}
    for event in order:
        if event in seeds:
            queue.queue(seeds[event])
            prompts[event] = queue.prompts[-1]
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


def play(queue, chance):
    """Some of everything that a user can do to the queue; the seeds that were queued."""
    seeds = []
    for _ in range(chance.randint(3, 8)):
        event = chance.choice(["queue", "queue", "queue", "interrupt", "delete", "cancel", "clear", "pause"])
        if event == "queue":
            seeds.append(chance.randrange(3000, 3004))
            queue.queue(seeds[-1])
        elif event == "interrupt":
            queue.client.post("/interrupt", {})
        elif event == "delete" and queue.prompts:
            queue.client.post("/queue", {"delete": [chance.choice(queue.prompts)]})
        elif event == "cancel" and queue.prompts:
            queue.cancel(chance.choice(queue.prompts))
        elif event == "clear":
            queue.client.post("/queue", {"clear": True})
        else:
            time.sleep(chance.random() * 0.1)
    queue.client.post("/interrupt", {})
    queue.wait()
    return seeds or [3000]


def resident_bytes(client):
    """Host memory of the server, once it was asked to let go of models, outputs and its list of past prompts."""
    client.post("/history", {"clear": True})
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
    status = Path(f"/proc/{client.server.process.pid}/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_random_sequences_leave_nothing_behind(client, queue, right_picture):
    for number in range(WARM_UP):
        check(client, right_picture, play(queue, random.Random(-1 - number))[-1])
    before = resident_bytes(client)
    for number in range(SEQUENCES):
        check(client, right_picture, play(queue, random.Random(number))[-1])
        assert client.server.process.poll() is None
    after = resident_bytes(client)
    print(f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after")  # noqa: T201
    assert after <= before * 1.01
