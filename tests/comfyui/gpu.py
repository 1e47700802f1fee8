"""Tests that need a graphics card, in every ComfyUI found: device memory, partly loaded weights, `--lowvram`.

    COMFYUI_PATH=… python -m cascade_nodes.tests.comfyui.gpu [flags for every ComfyUI]

Prints its figures as JSON and ends with 1 where one is outside its bound. Takes two minutes and some 10 GB of the card.

servers   for each set of flags a ComfyUI with the demo weights, whose queue is filled and emptied at random: the bytes
          that its networks and pictures hold on the device after each sequence, against those after some to warm up
card      networks of the published widths with random weights, in ComfyUI's own process: see inside/card.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, Checkout, Server
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.graphs import demo
from cascade_nodes.tests.comfyui.queueing import Queue, free

SEQUENCES, WARM_UP = 50, 10
GROWTH, LEAST_GROWTH_MIB = 0.01, 0.5
IN_PART = 0.0  # streamed weights give the same bits
ENGINE = 0.03  # two ways to add up in bf16, over three steps
ESTIMATE_OVER_PEAK = (1.0, 2.0)
PIXELS = 2  # of 255, between two runs of one prompt
# Without flags, and with those that keep weights in main memory; newer versions go by faults unless told not to.
FLAGS = ([], ["--lowvram"], ["--novram"])
STATIC = ["--disable-dynamic-vram"]


def graph(seed: int) -> dict[str, Any]:
    """The shipped graph with few steps."""
    return demo({"7.steps": 8, "8.steps": 5, "7.seed": seed, "8.seed": seed})


def has_dynamic(checkout: Checkout) -> bool:
    """Whether this ComfyUI knows dynamic VRAM."""
    return STATIC[0] in (checkout.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")


def flag_sets(checkout: Checkout) -> list[list[str]]:
    if not has_dynamic(checkout):
        return list(FLAGS)
    return [[], *(flags + STATIC for flags in FLAGS)]


class Card:
    """Memory that a server holds on its card."""

    def __init__(self, server: Server):
        self.server = server

    def held(self) -> int:
        """Bytes of tensors that are alive."""
        (device, *_) = self.server.get("/system_stats")["devices"]
        return device["torch_vram_total"] - device["torch_vram_free"]

    def process(self) -> int | None:
        """MiB of the whole process as the driver counts them: reserves, libraries and weights by faults too."""
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError):
            return None
        memory_by_process = dict(line.split(", ") for line in lines if ", " in line)
        memory = memory_by_process.get(str(self.server.process.pid), "")
        return int(memory) if memory.isdigit() else None


def sequences(checkout: Checkout, flags: list[str], further: list[str]) -> dict[str, Any]:
    """Plays 50 random sequences on one server; after each, a prompt is run to its end and its picture looked at."""
    pictures: dict[int, np.ndarray] = {}
    worst = 0

    def play(number: int) -> int:
        """Plays a sequence; returns the bytes that are held after it."""
        nonlocal worst
        seed = queue.play(random.Random(number))[-1]
        execution = client.run(graph(seed))
        assert execution.error is None, execution.error
        for picture in client.pictures(execution) if execution.executed else []:
            first = pictures.setdefault(seed, picture)
            worst = max(worst, int(np.abs(picture.astype(int) - first).max()))
        return card.held()

    with tempfile.TemporaryDirectory() as name:
        server = Server(checkout, Path(name), *flags, *further, cpu=False)
        with server, Client(server) as client:
            queue, card = Queue(client, graph), Card(server)
            (sample,) = client.pictures(client.run(graph(0)))
            for number in range(WARM_UP):
                play(-1 - number)
            free(client)
            freed = [card.process()]
            outcomes = [play(number) for number in range(SEQUENCES)]
            free(client)
            freed.append(card.process())
            return {
                "held_mib": [round(value / 2**20, 2) for value in outcomes],
                # What is never given back; for a moment a server may hold its last picture too.
                "growth_mib": (min(outcomes[-WARM_UP:]) - min(outcomes[:WARM_UP])) / 2**20,
                "freed_process_mib": freed,
                "pixels": worst,
                "log": [line for line in server.log.splitlines() if "vram" in line.lower()][:5],
                "picture": sample.astype(int),
            }


def on_card(checkout: Checkout, flags: list[str], further: list[str]) -> dict[str, Any]:
    """Runs inside ComfyUI, which must have a flag, so that it is set up as its program is."""
    return checkout.inside("card", flags=["--disable-auto-launch", *flags, *further])["card"].numbers


def attempt(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs a measurement; a failure must not lose what the others measured."""
    try:
        return call(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[-1500:]}"}


def measure(further: list[str]) -> dict[str, Any]:
    """Runs all servers at once, each counting its own memory; then the jobs that depend on the card's free memory."""
    serving = [(checkout, flags) for checkout in CHECKOUTS for flags in flag_sets(checkout)]
    alone = [(checkout, []) for checkout in CHECKOUTS]
    with ThreadPoolExecutor(len(serving)) as pool:
        servers = {named(job): pool.submit(attempt, sequences, *job, further) for job in serving}
    card = {named(job): attempt(on_card, *job, further) for job in alone}
    results = {name: future.result() for name, future in servers.items()}
    pictures = [result.pop("picture", None) for result in results.values()]
    for result, picture in zip(results.values(), pictures, strict=True):
        if picture is not None and pictures[0] is not None:
            result["mean difference from the first, of 255"] = float(np.abs(picture - pictures[0]).mean())
    return {"servers": results, "card": card}


def named(job: tuple[Checkout, list[str]]) -> str:
    """Version and flags."""
    return " ".join([job[0].version, *job[1]])


def failures(results: dict[str, Any]) -> list[str]:
    """What is outside its bound, in words."""
    checks = {"servers": of_sequences, "card": of_card}
    return [
        f"{name}: {failure}"
        for group, check in checks.items()
        for name, result in results[group].items()
        for failure in ([result["error"]] if "error" in result else check(result))
    ]


def of_sequences(server: dict[str, Any]) -> list[str]:
    failed = []
    before = server["held_mib"][0]
    if server["growth_mib"] > max(before * GROWTH, LEAST_GROWTH_MIB):
        failed.append(f"the device held {before} MiB, and {server['growth_mib']:.2f} MiB more later")
    before, after = server["freed_process_mib"]
    if before and after > before * (1 + GROWTH):
        failed.append(f"freed, the process took {before} MiB, and {after} MiB later")
    if server["pixels"] > PIXELS:
        failed.append(f"a picture differs by {server['pixels']} of 255 from its first run")
    return failed


def of_card(card: dict[str, Any]) -> list[str]:
    failed = []
    for name, value in card["in part"].items():
        if "against" in name and not value <= IN_PART:
            failed.append(f"{name}: {value:.2g}")
        if "share" in name:
            least, most = (0.95, 1.05) if "whole" in name else (0.0, 0.95)
            if not least < value < most:
                failed.append(f"{name}: {value:.2f}")
    for name, value in card["engine"].items():
        if "against" in name and not value <= ENGINE:
            failed.append(f"{name}: {value:.2g}")
        if "used" in name and not value:
            failed.append(f"{name}: no")
    low, high = ESTIMATE_OVER_PEAK
    for name, figures in card["estimates"].items():
        if not low <= figures["estimate_over_peak"] <= high:
            failed.append(f"{name}: the estimate is {figures['estimate_over_peak']:.2f} of the peak")
    return failed


def main(further: list[str]) -> int:
    """Measures and prints."""
    if not CHECKOUTS:
        raise SystemExit("There is no ComfyUI to measure: set COMFYUI_PATH, or see docs/testing.md.")
    results = measure(further)
    results["failures"] = failures(results)
    print(json.dumps(results))
    for failure in results["failures"]:
        print(f"OUTSIDE ITS BOUND: {failure}", file=sys.stderr)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
