# pyright: reportMissingImports=false
"""Model files in ComfyUI: its categories, `models/stable_cascade`, and the demo weights."""

import os
from pathlib import Path

import folder_paths

from ....cascade_core.errors import CascadeError, quoted
from .. import roles

DEMO_CATEGORY = "cascade_demo"
OWN_CATEGORIES = ("stable_cascade", "insightface")  # the second is shared with other packs


def register() -> None:
    """Registers categories that ComfyUI lacks; `extra_model_paths.yaml` may name them too."""
    for category in OWN_CATEGORIES:
        folder_paths.add_model_folder_path(category, os.path.join(folder_paths.models_dir, category))
    folder_paths.add_model_folder_path(DEMO_CATEGORY, str(roles.DEMO_FOLDER))


def input_folder() -> Path:
    """The folder whose pictures Load Image offers."""
    return Path(folder_paths.get_input_directory())


register()  # before the first schema asks for a list


def list_files(role: str) -> list[str]:
    """Names that `find_file` finds, the demo's first."""
    file_names: set[str] = set()
    for category in roles.FOLDERS[role]:
        category_names = folder_paths.get_filename_list(category)
        file_names.update(name for name in category_names if name.lower().endswith(roles.SUFFIXES))
    if role == "text_encoder":
        parents = {os.path.dirname(name) for name in file_names} - {""}
        file_names.update(name for name in parents if _find_folder(role, name))
    if role == "checkpoint":  # ComfyUI does not list the folders of diffusers
        folders = [
            Path(folder) for name in roles.FOLDERS[role] for folder in folder_paths.get_folder_paths(name)
        ]
        file_names.update(
            index.parent.relative_to(root).as_posix()
            for root in folders
            for index in root.glob("*/model_index.json")
        )
    demo = roles.demo_names(role)
    return demo + sorted(file_names - set(demo))


def find_file(role: str, name: str) -> Path:
    """Finds the file or folder of a name that `list_files` gives, and no other file in those folders.

    Names may also come over links, and ComfyUI does not compare those with the list. `\\` separates as `/` does.
    """
    if roles.leaves_folder(name.replace("\\", "/")):
        raise CascadeError(
            f"{quoted(name)} is not the name of a model file; choose one that the loader lists."
        )
    for spelled in roles.spellings(name):
        path = _find(role, spelled)
        if path is not None:
            return path
    roles.check_retired(name)
    folders = [
        folder for category in roles.FOLDERS[role] for folder in folder_paths.get_folder_paths(category)
    ]
    raise CascadeError(
        f"No {roles.ROLE_WORDS[role]} file {quoted(name)} was found in {', '.join(folders)}; put it there as "
        "safetensors and refresh the page."
    )


def _find(role: str, name: str) -> Path | None:
    if name.lower().endswith(roles.SUFFIXES) or role == "face":  # no loader lists InsightFace's files
        for category in roles.FOLDERS[role]:
            path = folder_paths.get_full_path(category, name)
            if path is not None:
                return Path(path)
    folder = _find_folder(role, name) if role in roles.FOLDER_TESTS else None
    if folder is None and name in roles.demo_names(role):
        return roles.DEMO_FOLDER / name
    return folder


def _find_folder(role: str, name: str) -> Path | None:
    candidates = [
        Path(folder) / name
        for category in roles.FOLDERS[role]
        for folder in folder_paths.get_folder_paths(category)
    ]
    return next((path for path in candidates if roles.FOLDER_TESTS[role](path)), None)
