"""Folders that the pictures of a run are read from and saved in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ..cascade_core.errors import CascadeError, printable, quoted
from ..nodes.hosts.roles import spellings

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ANNOTATION = re.compile(r"^(?P<name>.*) \[(?P<kind>input|output|temp)\]$")


@dataclass(frozen=True)
class Folders:
    """Folders of a run: `input` for LoadImage; `graph`, the graph's folder, also searched; `output` for SaveImage."""

    input: Path = Path("input")
    output: Path = Path("output")
    graph: Path = Path()

    @property
    def temp(self) -> Path:
        """Folder of PreviewImage."""
        return self.output / "temp"

    def of_kind(self, kind: str) -> Path:
        """Returns the folder that ComfyUI calls `input`, `output` or `temp`."""
        return {"input": self.input, "output": self.output, "temp": self.temp}[kind]

    def candidates(self, name: str) -> list[Path]:
        """Paths where a picture of this name may lie. `name [output]` means the output folder, as in ComfyUI.

        Graphs shipped with their pictures, such as the examples, have them in a folder `input` beside themselves, or
        beside the folder they are in.
        """
        annotated = _ANNOTATION.match(name)
        if annotated:
            folder = self.of_kind(annotated["kind"])
            return [folder / spelling for spelling in spellings(annotated["name"])]
        shipped = [self.graph / "input", self.graph.parent / "input"] if self.graph != Path() else []
        places = [self.input, self.graph, *shipped, Path()]
        return list(dict.fromkeys(place / spelling for spelling in spellings(name) for place in places))

    def find_picture(self, name: str) -> Path:
        """Returns the picture of this name. Raises CascadeError that names the paths searched."""
        candidates = self.candidates(name)
        for candidate in candidates:
            if name and os.path.isfile(candidate):  # unlike Path.is_file, False for a name that is too long
                return candidate
        places = ", ".join(printable(str(candidate), 120) for candidate in candidates)
        raise CascadeError(
            f"There is no picture {quoted(name)} (looked for {places}); give the name of a file."
        )

    def pictures(self) -> list[str]:
        """Names of the pictures in the input folder."""
        if not self.input.is_dir():
            return []
        return sorted(path.name for path in self.input.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)


_folders: ContextVar[Folders | None] = ContextVar("cascade_folders", default=None)


def current_folders() -> Folders:
    """Folders of the current run, or ./input and ./output outside one."""
    return _folders.get() or Folders()


@contextmanager
def using_folders(folders: Folders) -> Iterator[None]:
    """Makes nodes executed inside the block read from and write to `folders`."""
    token = _folders.set(folders)
    try:
        yield
    finally:
        _folders.reset(token)
