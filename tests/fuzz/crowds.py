"""Many threads and processes in one output folder, one run folder, one cache and one target: nothing is lost."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path
from random import Random

from cascade_nodes.headless.run import run_graph
from cascade_nodes.tests.fuzz.processes import (
    PICTURES,
    Workshop,
    ended,
    parts_left,
    started,
    undisturbed,
    whole_pictures,
)
from cascade_nodes.tests.fuzz.verdict import flaw


def in_a_container() -> None:
    """Every container's first process has the same id."""
    os.getpid = lambda: 1


class World:
    def __init__(self, folder: Path):
        self.shop = Workshop(folder)
        self.folder = folder
        self.expected = {}
        for name, arguments, path in (
            ("train", ["train", "lora", str(self.shop.settings())], "run/out.safetensors"),
            (
                "other",
                ["train", "lora", str(self.shop.settings(name="other", seed=1)), "--fresh"],
                "run/other.safetensors",
            ),
            (
                "convert",
                ["convert-lora", "lora.safetensors", "converted.safetensors", "--to", "comfyui"],
                "converted.safetensors",
            ),
            (
                "fetch",
                ["fetch", "stage_a", "--to", "hub", "--endpoint", self.shop.hub.url],
                "hub/vae/stage_a.safetensors",
            ),
        ):
            undisturbed(arguments, folder / "said.txt")
            self.expected[name] = (arguments, folder / path, (folder / path).read_bytes())
        self.clean()

    def clean(self) -> None:
        self.shop.forget("output", "run", "run1", "run2", "run3", "cache", "converted.safetensors", "hub")

    def attempt(self, random: Random) -> None:
        try:
            case = random.choice(
                (
                    self.threads,
                    self.threads,
                    self.processes,
                    self.processes,
                    self.one_run_folder,
                    self.one_cache,
                    self.one_target,
                )
            )
            case(random)
            left = [name for name in parts_left(self.folder) if not name.startswith("hub/")]
            assert not left, f"left behind: {left}"
        finally:
            self.clean()

    def threads(self, random: Random) -> None:
        graph = self.shop.graph(random.choice(("a", "sub/a", "a_%width%")))
        count, errors, named = random.choice((2, 6, 12)), [], []

        def run() -> None:
            try:
                named.extend(picture.path for picture in run_graph(graph).pictures)
            except BaseException as error:
                errors.append(repr(error))

        threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, f"{len(errors)} of {count} threads failed: {errors[0][:300]}"
        assert len(set(named)) == count * PICTURES, f"{len(set(named))} names for {count * PICTURES} pictures"
        self.check_pictures(count)

    def processes(self, random: Random) -> None:
        graph = self.shop.graph(random.choice(("a", "sub/a", "a_%height%")))
        count = random.choice((2, 4, 8))
        self.run_together([["run", str(graph)]] * count, random)
        self.check_pictures(count)

    def check_pictures(self, count: int) -> None:
        """Asserts that each picture is there as often as it was asked for."""
        counts = Counter(whole_pictures(self.folder / "output"))
        assert sorted(counts.values()) == [count] * PICTURES, (
            f"{count} times each was asked for, got {sorted(counts.values())}"
        )

    def one_run_folder(self, random: Random) -> None:
        """Several processes train in one folder: one trains, others are refused or find the run finished; each success
        is real.
        """
        names = random.choice(
            (
                ["train"] * 2,
                ["train"] * 3,
                ["train", "other"],
                ["train", "other"],
                ["train", "other", "other"],
            )
        )
        statuses = self.run_together([self.expected[name][0] for name in names], random, allowed=True)
        for name, status in zip(names, statuses, strict=True):
            _, path, content = self.expected[name]
            assert status or path.read_bytes() == content, "another file than one training alone gives"

    def one_cache(self, random: Random) -> None:
        commands = [["train", "lora", str(self.shop.settings(f"run{number}"))] for number in (1, 2, 3)]
        self.run_together(commands, random)
        for number in (1, 2, 3):
            content = (self.folder / f"run{number}" / "out.safetensors").read_bytes()
            assert content == self.expected["train"][2], "another file than one training alone gives"

    def one_target(self, random: Random) -> None:
        arguments, path, content = self.expected[random.choice(("convert", "fetch"))]
        self.run_together([arguments] * random.choice((2, 4)), random, allowed=True)
        assert path.read_bytes() == content

    def run_together(self, commands: list[list[str]], random: Random, allowed: bool = False) -> list[int]:
        """Starts all at once. allowed: whether all but one may be refused in a sentence."""
        prepare = in_a_container if random.random() < 0.5 else lambda: None
        said = [self.folder / f"said{number}.txt" for number in range(len(commands))]
        running = [started(command, file, prepare) for command, file in zip(commands, said, strict=True)]
        statuses = [ended(pid) for pid in running]
        texts = [file.read_text() for file in said]
        for file in said:
            file.unlink()
        for status, text in zip(statuses, texts, strict=True):
            errors = [
                line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")
            ]
            assert status == 0 or (allowed and status == 1 and len(errors) == 1), (
                f"ended with {status}: {text[-400:]!r}"
            )
            assert not (fault := flaw("\n".join(errors) or "none")), f"{fault}: {errors}"
        assert 0 in statuses, f"none worked: {texts[0][-300:]!r}"
        return statuses
