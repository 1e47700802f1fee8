"""Progress on the terminal: one line for each node or file, with a bar for those that have steps."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ..cascade_core.errors import escaped
from .results import Observer, SavedPicture

_WIDTH = 24


class ConsoleProgress(Observer):
    """Observer that writes to `stream`. On a terminal a node's line is redrawn as it runs; else written when done.

    The paths of saved pictures, with the seconds since the run began, go to `results` (standard output).
    """

    def __init__(self, stream: TextIO | None = None, results: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.results = results or sys.stdout
        self.live = self.stream.isatty()
        self.full, self.empty = ("█", "░") if _can_write(self.stream, "█░") else ("#", ".")
        self.head = ""
        self.bar = ""
        self.begun = 0.0
        self.open = False

    def seed_drawn(self, seed: int) -> None:
        self._finish(f"seed: {seed}")

    def node_started(self, index: int, total: int, name: str) -> None:
        self.head, self.bar, self.begun = f"[{index}/{total}] {name}", "", time.monotonic()
        self._draw(self.head)

    def node_step(self, step: int, total: int, preview: Any) -> None:
        done = _WIDTH * step // max(total, 1)
        self.bar = f"  {self.full * done}{self.empty * (_WIDTH - done)} {step}/{total}"
        self._draw(f"{self.head}{self.bar}  {time.monotonic() - self.begun:.1f} s")

    def node_notified(self, text: str) -> None:
        self._finish(f"{self.head}: {text}")

    def node_finished(self, seconds: float) -> None:
        self._finish(f"{self.head}{self.bar}  {seconds:.1f} s")

    def node_reused(self, index: int, total: int, name: str) -> None:
        self._finish(f"[{index}/{total}] {name}  reused")

    def picture_saved(self, picture: SavedPicture) -> None:
        self.close()
        print(f"{picture.path}  ({picture.seconds:.1f} s)", file=self.results, flush=True)

    def status(self, text: str) -> None:
        self._draw(text)

    def close(self) -> None:
        if self.open:
            self.stream.write("\n")
            self.stream.flush()
            self.open = False

    def _draw(self, line: str) -> None:
        if self.live:
            self.stream.write(f"\r{escaped(line)}\x1b[K")
            self.stream.flush()
            self.open = True

    def _finish(self, line: str) -> None:
        line = escaped(line)
        self.stream.write(f"\r{line}\x1b[K\n" if self.live else f"{line}\n")
        self.stream.flush()
        self.open = False


class TransferProgress(ConsoleProgress):
    """Progress of downloads: `node_started` begins a file, with its name."""

    def node_started(self, index: int, total: int, name: str) -> None:
        super().node_started(index, total, name)
        self.first: int | None = None

    def bytes_arrived(self, arrived: int, total: int) -> None:
        """Shows that `arrived` of `total` bytes are on the disk; an earlier transfer's do not count for speed."""
        self.first = arrived if self.first is None else min(self.first, arrived)
        done, seconds = _WIDTH * arrived // max(total, 1), time.monotonic() - self.begun
        self.bar = (
            f"  {self.full * done}{self.empty * (_WIDTH - done)} {arrived / 1e6:.0f}/{total / 1e6:.0f} MB"
        )
        speed = (arrived - self.first) / 1e6 / max(seconds, 1e-3)
        self._draw(f"{self.head}{self.bar}  {speed:.1f} MB/s")

    def file_arrived(self, path: Path, seconds: float) -> None:
        """Reports that the file is whole, verified and in its place."""
        self.node_finished(seconds)
        print(path, file=self.results, flush=True)

    def file_kept(self, path: Path) -> None:
        """Reports that the file existed already."""
        self._finish(f"{self.head}  already there, whole")
        print(path, file=self.results, flush=True)


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
