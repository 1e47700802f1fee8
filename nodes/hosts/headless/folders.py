"""Finds model files without ComfyUI.

Roots, in this order: every folder of `$CASCADE_MODELS`, ComfyUI's own `models` where the pack lies in its
`custom_nodes`, `./models`, `models` in the pack; each with ComfyUI's subfolders. The bundled demo weights are
always offered, and any existing path is accepted.
"""

import os
from pathlib import Path

from ....cascade_core.errors import CascadeError, quoted
from .. import roles


def roots() -> list[Path]:
    """The folders in the role of ComfyUI's `models`; new files go to the first."""
    stated = [Path(entry) for entry in os.environ.get("CASCADE_MODELS", "").split(os.pathsep) if entry]
    return [*stated, *_comfyui_models(), Path("models"), roles.PACK / "models"]


def _comfyui_models() -> list[Path]:
    models = roles.PACK.parents[1] / "models"
    return [models] if roles.PACK.parent.name == "custom_nodes" and models.is_dir() else []


def search_folders(role: str) -> list[Path]:
    """Every folder that may hold a file of this role, whether it exists or not."""
    return [
        root / subfolder
        for category in roles.FOLDERS[role]
        for root in roots()
        for subfolder in roles.subfolders(category)
    ]


def list_files(role: str) -> list[str]:
    """Names that `find_file` can find, the demo's first."""
    found = {name for folder in search_folders(role) for name in roles.names_in(folder, role)}
    demo = roles.demo_names(role)
    return demo + sorted(found - set(demo))


def find_file(role: str, name: str) -> Path:
    """The file or folder of a name, or at an existing path."""
    spellings = roles.spellings(name)
    for spelling in spellings:
        if not roles.leaves_folder(spelling):
            for folder in search_folders(role):
                # Unlike Path.exists, os.path.exists is False for a name that is too long.
                if Path(spelling).name and os.path.exists(folder / spelling):
                    return folder / spelling
    if name in roles.demo_names(role):
        return roles.DEMO_FOLDER / name
    for spelling in spellings:
        if Path(spelling).name and os.path.exists(spelling):  # neither "." nor "/"
            return Path(spelling)
    roles.check_retired(name)
    places = ", ".join(str(root) for root in roots())
    raise CascadeError(
        f"No {roles.ROLE_WORDS[role]} file {quoted(name)} was found under {places} (in "
        f"{', '.join(roles.FOLDERS[role])}); put it there, set CASCADE_MODELS, or give its path."
    )


def input_folder() -> None:
    """Returns None: each run has its own folder, and pictures beside its graph are found without it."""
