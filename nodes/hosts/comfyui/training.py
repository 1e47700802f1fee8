# pyright: reportMissingImports=false
"""Training in ComfyUI: its folders, progress and memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from ....cascade_core.errors import Interrupted
from .. import roles

PICTURE_SIDE = 1024  # largest side, in pixels, of the curve and samples in the node


def new_files_folder(role: str) -> Path:
    """Folder of new files of that role, in which its loader finds them."""
    return Path(folder_paths.get_folder_paths(roles.FOLDERS[role][0])[0])


def interrupted() -> bool:
    """Whether the user asks the running prompt to end."""
    return comfy.model_management.processing_interrupted()


@contextmanager
def training() -> Iterator[Callable[..., None]]:
    """Yields a run's report function, after ComfyUI's models have left the accelerator's memory."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    bars: dict[int, comfy.utils.ProgressBar] = {}

    def report(step: int, steps: int, picture: Any = None) -> None:
        preview = None if picture is None else ("JPEG", picture, PICTURE_SIDE)
        if steps not in bars:
            bars[steps] = comfy.utils.ProgressBar(steps)
        try:
            bars[steps].update_absolute(step, steps, preview)
        except comfy.model_management.InterruptProcessingException:
            # Reading the request clears it, so it is set again; the run checks for itself, and ends after its
            # checkpoint is written.
            comfy.model_management.interrupt_current_processing()

    try:
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes without gradients
            yield report
    except Interrupted:
        pass
    comfy.model_management.throw_exception_if_processing_interrupted()
