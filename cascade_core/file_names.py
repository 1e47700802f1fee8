"""Checks of file names from untrusted sources: a graph, a client or a server."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LONGEST_NAME = 200  # bytes; file systems allow 255, and a number and an extension may be added
LONGEST_PATH = 4000  # characters
# Unicode categories of invisible characters that act: controls, text directions, surrogates, line ends.
_ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"),
}
_FORBIDDEN = '/\\<>:"|?*' if os.name == "nt" else "/\\"


def name_fault(name: object) -> str | None:
    """Why a value is not a safe name of a file or folder on every system, as the end of a sentence; None if it is."""
    if not isinstance(name, str) or not name:
        return "is not a name"
    if any(unicodedata.category(character) in _ACTING for character in name):
        return "holds control characters"
    if any(character in name for character in _FORBIDDEN):
        return f"holds one of {' '.join(_FORBIDDEN)}"
    if name.startswith("."):
        return "begins with a dot, which hides a file"
    if name != name.rstrip(". "):
        return "ends in a dot or a space, which Windows drops"
    if name.split(".")[0].rstrip().lower() in _RESERVED:
        return "is a device of Windows"
    if len(name.encode()) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return None


def path_fault(path: object) -> str | None:
    """Why a value is not a safe relative path of folders, such as `stars/red`; None if it is, or if it is empty."""
    if not isinstance(path, str) or len(path) > LONGEST_PATH:
        return "is not a path of folders"
    if path.startswith(("/", "\\")):
        return "leads out of the folder"
    parts = path.replace("\\", "/").split("/") if path else []
    if ".." in parts:
        return "leads out of the folder"
    return next((fault for part in parts if part not in ("", ".") and (fault := name_fault(part))), None)


def inside(folder: Path, path: str) -> Path | None:
    """A relative path in `folder`; None where the path, or a symbolic link on the way, leads out of the folder."""
    place = folder / PurePosixPath(path.replace("\\", "/"))
    real = Path(os.path.realpath(place))  # unlike Path.resolve, also works for links in a circle
    return place if real.is_relative_to(os.path.realpath(folder)) else None


def numbered(path: Path) -> Iterator[Path]:
    """The path itself, then style_00001.safetensors and so on: for `writing.move_to_free`."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number:05}{path.suffix}")
