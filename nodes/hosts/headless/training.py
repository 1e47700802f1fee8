"""Where training reads and writes without ComfyUI, and how it is watched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ....cascade_core.errors import Interrupted
from .. import roles
from ..reporting import check_interrupted, report
from .folders import roots


def picture_folder(name: str) -> Path:
    """A folder of training pictures: in ./input, or any path."""
    inside = Path("input") / name
    return inside if inside.is_dir() else Path(name)


def new_file(role: str, name: str) -> Path:
    """Where a new file of that role goes, to be found by its loader under its name."""
    return roots()[0] / roles.subfolders(roles.FOLDERS[role][0])[0] / name


def run_folder(name: str) -> Path:
    """Where a run keeps its checkpoint, log and samples."""
    return Path("output") / "training" / name


@contextmanager
def training() -> Iterator[tuple[Callable[[int, int], None], Callable[[], bool]]]:
    """(report, stop) of a run: report(step, steps) moves the node's bar, stop() says whether it should end.

    A run that was asked to end ends the graph after the block.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield report, _asked
    check_interrupted()


def _asked() -> bool:
    try:
        check_interrupted()
    except Interrupted:
        return True
    return False
