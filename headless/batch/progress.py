"""Progress of a batch: a line for each row with the remaining time; paths go to standard output."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...cascade_core.errors import printable
from ..progress import ConsoleProgress
from ..results import SavedPicture

_MOST_LISTED = 20  # rows, in one line


class BatchProgress(ConsoleProgress):
    """Observer of the graph in this process, and of all rows, wherever they are made."""

    def __init__(self, signals: list[int] | None = None) -> None:
        super().__init__()
        self.signals = signals if signals is not None else []
        self.told = False
        self.total = self.count = self.made = 0
        self.first_end = 0.0
        self.under_way: Iterable[str] = ()

    def begin(self, total: int) -> None:
        """Starts to count rows; `total` are to be made."""
        self.total = total

    def row_made(self, name: str, seconds: float, paths: list[Path]) -> None:
        self._count(name, f"{seconds:.1f} s", counts=True)
        for path in paths:
            self.file_written(path)

    def row_there(self, name: str) -> None:
        """Reports a row that another process has made."""
        self._count(name, "made by another process", counts=False)

    def row_failed(self, name: str, error: str) -> None:
        self._count(name, error, counts=False)

    def row_again(self, name: str, reason: str) -> None:
        """Reports that a row's worker is lost, and that the row is tried again."""
        self.notify(f"{name}: {reason} It is done again.")

    def file_written(self, path: Path) -> None:
        """Writes a path to standard output."""
        self.close()
        print(path, file=self.results, flush=True)

    def notify(self, text: str) -> None:
        self._finish(text)

    def say_stopping(self) -> None:
        """Tells once which rows are being finished before the stop."""
        if self.signals and not self.told:
            self.told = True
            self.notify(f"Stopping after {listed(self.under_way)}; a second signal drops what is under way.")

    def _count(self, name: str, text: str, counts: bool) -> None:
        now = time.monotonic()
        self.count += 1
        if counts:
            self.made += 1
            self.first_end = self.first_end or now
        left = ""
        if self.made > 1 and self.count < self.total:
            from ...cascade_core.training.log import duration

            # Timed from the end of the first row, in which models were loaded.
            each = (now - self.first_end) / (self.made - 1)
            left = f", {duration(each * (self.total - self.count))} left"
        self._finish(f"[{self.count}/{self.total}] {printable(name)}: {text}{left}")

    # Nodes of a graph in this process: one line, and only on terminals, where it can be overwritten.

    def picture_saved(self, picture: SavedPicture) -> None:
        """Does nothing: the picture first gets its row's name."""

    def seed_drawn(self, seed: int) -> None:
        """Does nothing: the picture contains the seed."""

    def node_started(self, index: int, total: int, name: str) -> None:
        rows = "".join(self.under_way)
        self.head, self.bar, self.begun = (
            f"[{self.count + 1}/{self.total}] {rows}: {name}",
            "",
            time.monotonic(),
        )
        self._draw(self.head)
        self.say_stopping()

    def node_step(self, step: int, total: int, preview: Any) -> None:
        super().node_step(step, total, preview)
        self.say_stopping()

    def node_finished(self, seconds: float) -> None:
        """Does nothing: a row has a dozen nodes."""

    def node_reused(self, index: int, total: int, name: str) -> None:
        """Does nothing: models are reused in every row."""


def listed(names: Iterable[str]) -> str:
    """Names in a sentence."""
    names = list(names)
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(printable(name) for name in names[:_MOST_LISTED]) + more or "nothing"
