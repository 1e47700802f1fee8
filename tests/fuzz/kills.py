"""Commands ended by a signal at a random moment: nothing half-written stays, nothing earlier is lost, a rerun works."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

from cascade_nodes.tests.fuzz.processes import (
    CONTENT,
    PICTURES,
    Workshop,
    check_weights,
    ended,
    parts_left,
    started,
    undisturbed,
    whole_pictures,
)

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)


class World:
    def __init__(self, folder: Path):
        self.shop = Workshop(folder)
        self.folder, self.said = folder, folder / "said.txt"
        self.commands = {
            "run": ["run", str(self.shop.graph())],
            "train": ["train", "lora", str(self.shop.settings())],
            "convert-lora": [
                "convert-lora",
                "lora.safetensors",
                "converted.safetensors",
                "--to",
                "comfyui",
                "--force",
            ],
            "fetch": ["fetch", "stage_a", "--to", "hub", "--endpoint", self.shop.hub.url],
        }
        self.results = {"train": folder / "run" / "out.safetensors", "convert-lora": folder / "converted.safetensors",
                        "fetch": folder / "hub" / "vae" / "stage_a.safetensors"}  # fmt: skip
        self.seconds, self.expected = {}, {}
        for name, arguments in self.commands.items():
            undisturbed(arguments, self.said)  # the caches are there from now on
            self.clean()
            self.seconds[name] = undisturbed(arguments, self.said)
            if name in self.results:
                self.expected[name] = self.results[name].read_bytes()
            self.clean()
        assert self.expected["fetch"] == CONTENT

    def clean(self) -> None:
        self.shop.forget("output", "run", "converted.safetensors", "hub")

    def attempt(self, random: Random) -> None:
        name = random.choice(list(self.commands))
        earlier = random.random() < 0.5
        if earlier and name == "convert-lora":
            self.results[name].write_bytes(b"earlier")
        if earlier and name == "run":
            undisturbed(self.commands[name], self.said)
        before = len(whole_pictures(self.folder / "output"))
        number = random.choice(SIGNALS)
        try:
            self.disturb(name, number, random)
            if name == "run":
                pictures = len(whole_pictures(self.folder / "output"))
                assert before <= pictures <= before + PICTURES, (
                    f"{before} pictures before, {pictures} after {number.name}"
                )
                undisturbed(self.commands[name], self.said)
                assert len(whole_pictures(self.folder / "output")) == pictures + PICTURES, (
                    "the rerun lost pictures"
                )
            else:
                self.check_result(name, earlier)
                undisturbed(self.commands[name], self.said)
                assert self.results[name].read_bytes() == self.expected[name], (
                    f"the rerun of {name} gave another file"
                )
        finally:
            self.clean()

    def disturb(self, name: str, number: signal.Signals, random: Random) -> None:
        pid = started(self.commands[name], self.said)
        time.sleep(random.uniform(0.0, self.seconds[name] * 1.1))
        os.kill(pid, number)
        if number == signal.SIGINT and random.random() < 0.3:
            os.kill(pid, number)
        status = ended(pid)
        text = self.said.read_text()
        assert "Traceback" not in text, f"{name} after {number.name}: {text[-400:]!r}"
        assert "left main" not in text, f"{name} after {number.name}: {text[-400:]!r}"
        assert status in (0, 1, 130, 143, -number), (
            f"{name} ended with {status} after {number.name}: {text[-300:]!r}"
        )
        left = parts_left(self.folder)
        assert number == signal.SIGKILL or name == "fetch" or not left, (
            f"{name} left {left} after {number.name}"
        )

    def check_result(self, name: str, earlier: bool) -> None:
        """Asserts that the whole file is there, or what was there before."""
        path = self.results[name]
        if path.exists():
            content = path.read_bytes()
            whole = content == self.expected[name] or (
                earlier and name == "convert-lora" and content == b"earlier"
            )
            assert whole, f"{path.name} is not whole: {len(content)} of {len(self.expected[name])} bytes"
        else:
            assert not (earlier and name == "convert-lora"), "the earlier file was lost"
        check_weights(self.folder / "run" / "state.safetensors")
