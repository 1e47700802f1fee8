"""Copies the example graphs' input pictures to the folder of the host's Load Image."""

import logging
import os
import shutil
from pathlib import Path

from ...cascade_core.writing import replacing
from .roles import PACK

PICTURES = PACK / "example_workflows" / "input"


def place_pictures(folder: Path) -> None:
    """Copies the pictures into a folder, except those whose names are taken there; logs those that it cannot write."""
    for picture in sorted(PICTURES.glob("*.png")):
        target = folder / picture.name
        if os.path.lexists(target):
            continue
        try:
            with replacing(target, overwrite=False) as temporary:
                shutil.copyfile(picture, temporary)
        except OSError as error:
            if os.path.lexists(target):  # another ComfyUI with this folder has written it meanwhile
                continue
            logging.warning(
                "Stable Cascade: the pictures of the example workflows could not be copied into %s (%s); copy them "
                "from %s, or choose pictures of your own.", folder, error.strerror or error, PICTURES,
            )  # fmt: skip
            return
