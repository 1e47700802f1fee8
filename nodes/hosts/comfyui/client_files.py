# pyright: reportMissingImports=false
"""Files that clients of the server, who may be strangers to its owner, can read and write by training.

Pictures come from ComfyUI's input folder and from folders that the owner lists in `cascade_nodes.yaml`, in ComfyUI's
user folder. Runs are kept beside it, in a folder that no route of ComfyUI serves: its name begins with two
underscores, and no user's name may.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import folder_paths

from ....cascade_core.errors import CascadeError, quoted

OWN_FOLDER = "__cascade_nodes"
SETTINGS = "cascade_nodes.yaml"
KEY = "picture_folders"
LONGEST_PATH = 4096  # characters, on Linux; other systems allow fewer


@dataclass(frozen=True)
class OwnerSettings:
    """Settings in the owner's file."""

    picture_folders: tuple[str, ...] = ()


def data_path(name: str) -> Path:
    """Path of a file or folder of training data. Raises CascadeError for one outside of the folders, existing or not.

    A path is first compared as written, so that nothing outside is even looked up.
    """
    root = Path(folder_paths.get_input_directory())
    path = Path(os.path.normpath(root / name))
    if _inside(path, [root]) or _inside(path, _owner_folders()):
        return path
    line = f"{KEY}: [{json.dumps(str(path)[:1000], ensure_ascii=not str(path).isprintable())}]"
    raise CascadeError(
        f"{quoted(name)} is not in ComfyUI's input folder, outside of which clients read nothing; put the pictures "
        f"there, or let the owner of the server write the line {line} into {_settings_file()}."
    )


def data_check() -> Callable[[Path], None]:
    """A function that raises CascadeError for a link in training data whose target clients must not read."""
    root, owner_folders = Path(folder_paths.get_input_directory()), cache(_owner_folders)

    def check(path: Path) -> None:
        if not (_inside(path, [root]) or _inside(path, owner_folders())):
            # The message does not show the path, which clients must not see either.
            raise CascadeError(
                "A link in the training data leads to a place that clients must not read; put the file itself "
                "in the link's place."
            )

    return check


def _inside(path: Path, folders: list[Path]) -> bool:
    """Whether a path lies in one of the folders, both as written and with its links resolved."""
    if len(str(path)) > LONGEST_PATH:  # every part of it would be looked up
        return False
    try:
        real = {folder: Path(os.path.realpath(folder)) for folder in folders}
        return any(map(path.is_relative_to, [*real, *real.values()])) and any(
            map(Path(os.path.realpath(path)).is_relative_to, real.values())
        )
    except ValueError:  # NUL or a lone surrogate
        return False


def training_folder() -> Path:
    """Folder of the runs' checkpoints, logs, samples and latents."""
    return Path(folder_paths.get_user_directory()) / OWN_FOLDER / "training"


def former_training_folder() -> Path:
    """Folder in which earlier versions kept runs by task and name."""
    return Path(folder_paths.get_output_directory()) / "training"


def _settings_file() -> Path:
    return Path(folder_paths.get_user_directory()) / SETTINGS


def _owner_folders() -> list[Path]:
    from ....cascade_core.training.typed_yaml import build, read_yaml

    path = _settings_file()
    if not path.exists():
        return []
    try:
        settings = build(OwnerSettings, read_yaml(path))
    except CascadeError as error:
        logging.warning("Stable Cascade: %s", error)  # clients must not see the file's contents
        raise CascadeError(f"{path} cannot be used; the server's log says why.") from None
    return [Path(os.path.normpath(path.parent / folder)) for folder in settings.picture_folders]
