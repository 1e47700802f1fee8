"""Inputs that name a model file: the list of options, the path behind a name, and its fingerprint."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from ..cascade_core.errors import CascadeError
from .api import io
from .hosts import host
from .hosts.roles import DEMO_NAMES, ROLE_WORDS

NO_FILE = "none"
MOST_FILES = 10_000


def file_input(input_id: str, role: str, tooltip: str, optional_file: bool = False) -> Any:
    """Combo of the files that the host finds for a role; the list is made anew for each schema."""
    names = ([NO_FILE] if optional_file else []) + host().list_files(role)
    default = DEMO_NAMES.get(role) if DEMO_NAMES.get(role) in names else None
    return io.Combo.Input(input_id, options=names, default=default, tooltip=tooltip)


def find(role: str, name: str) -> Path:
    """Finds the file behind a combo's value.

    Values are checked here and not against the list: ComfyUI 0.3.64 does not check the combos of V3 nodes, and the
    embedded host also takes paths.
    """
    if not isinstance(name, str) or not name:
        raise CascadeError(f"No {ROLE_WORDS[role]} file is chosen; choose one in the loader.")
    return host().find_file(role, name)


def check(role: str, name: str | None) -> bool | str:
    """True, or an error message, for `validate_inputs`. name None: the value comes over a link and is checked later."""
    if name is None:
        return True
    try:
        find(role, name)
    except CascadeError as error:
        return str(error)
    return True


def fingerprint(role: str, name: str) -> str:
    """Fingerprint that changes with the file, so that a replaced file is loaded anew."""
    try:
        path = find(role, name)
    except CascadeError:
        return f"{name}: missing"
    return f"{path}: {stamp(files_under(path) if path.is_dir() else [path])}"


def files_under(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, at most MOST_FILES: a model has dozens, a whole disk millions."""
    paths = (Path(place, name) for place, folders, names in os.walk(folder) for name in (*folders, *names))
    return sorted(islice(paths, MOST_FILES))


def stamp(files: Iterable[Path]) -> str:
    """Names, sizes, times and inodes of the files among these paths, which change when one is changed or replaced."""
    stats = [(file.name, file.stat()) for file in files if os.path.isfile(file)]
    return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for name, stat in stats)
