"""The report of `cascade verify`: its data, its sentences about problems, its file."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ...cascade_core import writing
from ...cascade_core.errors import CascadeError, Interrupted, on_one_line
from ..saving import check_folder
from .machine import machine, versions

FORMAT = 1
NAME = "cascade_verify"
PICTURES = (".png", "_diffusers.png")  # suffixes of its pictures' names, after the report's name


class Report:
    """The findings, in `data`, written to `json_path` after every file, so that a crash loses at most one.

    roots   the searched folders, which the report does not name
    output  the folder of the JSON file and the pictures
    """

    def __init__(self, roots: Iterable[Path], output: Path):
        check_folder(output)
        self.roots = list(roots)
        self.problems: list[str] = []
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(),
            "diffusers": None,
            "files": [],
            "others": 0,
            "picture": {},
            "problems": self.problems,
        }
        self.json_path = self._reserve(output)

    @contextmanager
    def recording(self, subject: str, path: Path | None = None) -> Iterator[None]:
        """Turns errors inside the block into a sentence of the report, so that the rest goes on."""
        try:
            yield
        except Interrupted:
            raise
        except CascadeError as error:
            named = path is not None and path.name in str(error)
            self.add_problem(str(error) if named else f"{subject}: {error}", path)
        except Exception as error:  # of torch, a library or our code
            self.add_problem(f"{subject}: {on_one_line(error)[:500]}", path)
        if torch.cuda.is_available():  # the next network needs the memory of the unfinished one
            torch.cuda.empty_cache()

    def add_problem(self, sentence: str, path: Path | None = None) -> None:
        """Adds a sentence about a problem.  path: the file concerned"""
        self.problems.append(self.names_only(sentence, path))

    def names_only(self, text: str, path: Path | None = None) -> str:
        """A sentence without the folders of this machine."""
        places = [*self.roots, Path(), Path.home(), Path(sys.prefix), *([path.parent] if path else [])]
        names = {str(form) for place in places for form in (place, place.absolute(), place.resolve())}
        for name in sorted(names, key=len, reverse=True):
            if len(name) > 1:
                text = text.replace(name + os.sep, "").replace(name, "the folder")
        return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:;,'\"()]+)+[/\\]", "", text)

    def write(self) -> None:
        """Writes the JSON file as the report is now."""
        writing.write_file(self.json_path, self._text())

    def picture_paths(self) -> list[Path]:
        """The paths of our picture and of diffusers', beside the JSON file."""
        return [self.json_path.with_name(self.json_path.stem + end) for end in PICTURES]

    def _text(self) -> str:
        text = json.dumps(self.data, indent=1)  # in ASCII, since a name may hold lone surrogates
        return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", _on_one_line, text) + "\n"

    def _reserve(self, output: Path) -> Path:
        """Writes the present report under the first name that is free for it and its pictures."""
        stems = (NAME if number == 1 else f"{NAME}_{number}" for number in count(1))
        while True:
            path = output / f"{next(stems)}.json"
            if any(os.path.lexists(path.with_name(path.stem + end)) for end in PICTURES):
                continue
            try:
                with writing.replacing(path, overwrite=False) as temporary:
                    temporary.write_text(self._text(), encoding="utf-8")
            except FileExistsError:
                continue
            return path


def _on_one_line(match: re.Match[str]) -> str:
    """A list of numbers on one line."""
    return f"[{' '.join(match[1].split())}]"
