"""Pictures that the example graphs start from, put where the host's Load Image finds them."""

import logging
import os
import shutil
from pathlib import Path

from ...cascade_core.writing import replacing
from .roles import PACK

PICTURES = PACK / "example_workflows" / "input"


def place_pictures(folder: Path) -> None:
    """Copies those whose names are free into a folder. One that cannot be written leaves a line in the log."""
    for picture in sorted(PICTURES.glob("*.png")):
        target = folder / picture.name
        if os.path.lexists(target):
            continue
        try:
            with replacing(target, overwrite=False) as temporary:
                shutil.copyfile(picture, temporary)
        except OSError as error:
            if os.path.lexists(target):  # another ComfyUI with this folder was faster
                continue
            logging.warning(
                "Stable Cascade: the pictures of the example workflows could not be copied into %s (%s); copy them "
                "from %s, or choose pictures of your own.", folder, error.strerror or error, PICTURES,
            )  # fmt: skip
            return
