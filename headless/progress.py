"""Progress on the terminal: one line for each node, with a bar for those that go in steps."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from .results import Observer, Picture

_WIDTH = 24


class ConsoleProgress(Observer):
    """Writes to `stream`. On a terminal a node's line is redrawn as it runs; elsewhere it comes when done.

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

    def node_started(self, index: int, total: int, name: str) -> None:
        self.head, self.bar, self.begun = f"[{index}/{total}] {name}", "", time.monotonic()
        self._draw(self.head)

    def node_step(self, step: int, total: int, preview: Any) -> None:
        done = _WIDTH * step // max(total, 1)
        self.bar = f"  {self.full * done}{self.empty * (_WIDTH - done)} {step}/{total}"
        self._draw(f"{self.head}{self.bar}  {time.monotonic() - self.begun:.1f} s")

    def node_finished(self, seconds: float) -> None:
        self._finish(f"{self.head}{self.bar}  {seconds:.1f} s")

    def node_reused(self, index: int, total: int, name: str) -> None:
        self._finish(f"[{index}/{total}] {name}  reused")

    def picture_saved(self, picture: Picture) -> None:
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
            self.stream.write(f"\r{line}\x1b[K")
            self.stream.flush()
            self.open = True

    def _finish(self, line: str) -> None:
        self.stream.write(f"\r{line}\x1b[K\n" if self.live else f"{line}\n")
        self.stream.flush()
        self.open = False


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
