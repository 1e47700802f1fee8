"""Everything that a user can do to a server's queue, at random."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from cascade_nodes.tests.comfyui.client import Client


class Queue:
    """A server's queue as one tab sees it. graph: the prompt for a seed."""

    def __init__(self, client: Client, graph: Callable[[int], dict[str, Any]]):
        self.client = client
        self.graph = graph
        self.prompts: list[str] = []

    def queue(self, seed: int) -> str:
        """The id of the prompt that was added."""
        self.prompts.append(self.client.queue(self.graph(seed)))
        return self.prompts[-1]

    def cancel(self, prompt_id: str) -> None:
        """Cancels a prompt: interrupts it where it runs, deletes it where it waits, does nothing where it is done."""
        running, pending = self.state()
        if prompt_id in running:
            self.client.post("/interrupt", {})
        elif prompt_id in pending:
            self.client.post("/queue", {"delete": [prompt_id]})

    def state(self) -> list[list[str]]:
        """[running, pending], ids of prompts."""
        state = self.client.server.get("/queue")
        return [[entry[1] for entry in state[f"queue_{kind}"]] for kind in ("running", "pending")]

    def wait(self) -> None:
        """Waits until nothing runs or is queued."""
        deadline = time.monotonic() + 60
        while any(self.state()):
            assert time.monotonic() < deadline, "the queue does not come to an end"
            time.sleep(0.01)

    def play(self, chance: random.Random, first_seed: int = 3000) -> list[int]:
        """Plays a random sequence of queuing and cancelling, until all is quiet; returns the seeds that were queued."""
        seeds = []
        for _ in range(chance.randint(3, 8)):
            event = chance.choice(
                ["queue", "queue", "queue", "interrupt", "delete", "cancel", "clear", "pause"]
            )
            if event == "queue":
                seeds.append(chance.randrange(first_seed, first_seed + 4))
                self.queue(seeds[-1])
            elif event == "interrupt":
                self.client.post("/interrupt", {})
            elif event == "delete" and self.prompts:
                self.client.post("/queue", {"delete": [chance.choice(self.prompts)]})
            elif event == "cancel" and self.prompts:
                self.cancel(chance.choice(self.prompts))
            elif event == "clear":
                self.client.post("/queue", {"clear": True})
            else:
                time.sleep(chance.random() * 0.1)
        self.client.post("/interrupt", {})
        self.wait()
        return seeds or [first_seed]


def free(client: Client) -> None:
    """Asks the server to let go of models, outputs and its list of past prompts, and gives it time to do so."""
    client.post("/history", {"clear": True})
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)
