"""Folders and progress of training without ComfyUI."""

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
    """Path of training data: in ./input, or any path, since a graph here is run by the owner of the files."""
    inside = Path("input") / name
    return inside if os.path.exists(inside) else Path(name).expanduser()


def data_check() -> None:
    """Returns None: links may lead anywhere."""


def new_files_folder(role: str) -> Path:
    """Folder for new files of that role, where its loader finds them."""
    return roots()[0] / roles.subfolders(roles.FOLDERS[role][0])[0]


def training_folder() -> Path:
    """Folder of the runs' checkpoints, logs, samples and latents."""
    return Path("output") / "training"


def former_training_folder() -> Path:
    """Folder in which earlier versions kept runs by task and name."""
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
    """Yields the report function of a run. A run that was asked to stop ends the graph after the block.

    The run's pictures are not shown here, but lie in its folder.
    """

    def report_steps(step: int, steps: int, picture: Any = None) -> None:
        if picture is None:
            report(step, steps)

    with torch.inference_mode(False), torch.enable_grad():
        yield report_steps
    check_interrupted()
