"""Where training reads and writes without ComfyUI, and how it is watched."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ....cascade_core.errors import Interrupted
from .. import roles
from ..reporting import check_interrupted, report
from .folders import roots


def data_path(name: str) -> Path:
    """Path of training data: in ./input, or any path, as who runs a graph here is the owner of the files."""
    inside = Path("input") / name
    return inside if os.path.exists(inside) else Path(name).expanduser()


def data_check() -> None:
    """Nothing: links may lead anywhere."""


def new_files_folder(role: str) -> Path:
    """Folder of new files of that role, in which its loader finds them."""
    return roots()[0] / roles.subfolders(roles.FOLDERS[role][0])[0]


def training_folder() -> Path:
    """Folder of the runs' checkpoints, logs, samples and latents."""
    return Path("output") / "training"


def former_training_folder() -> Path:
    """Where earlier versions kept a run by its task and name alone."""
    return training_folder()


def interrupted() -> bool:
    """Whether the run was asked to stop."""
    try:
        check_interrupted()
    except Interrupted:
        return True
    return False


@contextmanager
def training() -> Iterator[Callable[..., None]]:
    """Yields report of a run. One that was asked to end ends the graph after the block.

    Its pictures are not shown here: they lie in the run's folder.
    """

    def report_steps(step: int, steps: int, picture: Any = None) -> None:
        if picture is None:
            report(step, steps)

    with torch.inference_mode(False), torch.enable_grad():
        yield report_steps
    check_interrupted()
