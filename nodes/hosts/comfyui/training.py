# pyright: reportMissingImports=false
"""Training in ComfyUI: its folders, progress and memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from .. import roles


def picture_folder(name: str) -> Path:
    """Folder of training pictures: in ComfyUI's input folder, or any path."""
    inside = Path(folder_paths.get_input_directory()) / name
    return inside if inside.is_dir() else Path(name)


def new_file(role: str, name: str) -> Path:
    """Path of a new file of that role, which its loader finds under its name."""
    return Path(folder_paths.get_folder_paths(roles.FOLDERS[role][0])[0]) / name


def run_folder(name: str) -> Path:
    """Folder of a run's checkpoint, log and samples."""
    return Path(folder_paths.get_output_directory()) / "training" / name


@contextmanager
def training() -> Iterator[tuple[Callable[[int, int], None], Callable[[], bool]]]:
    """Yields (report, stop) of a run, after ComfyUI's models have left the accelerator's memory."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    bars: dict[int, comfy.utils.ProgressBar] = {}

    def report(step: int, steps: int) -> None:
        if steps not in bars:
            bars[steps] = comfy.utils.ProgressBar(steps)
        bars[steps].update_absolute(step, steps)

    with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes without gradients
        yield report, comfy.model_management.processing_interrupted
    comfy.model_management.throw_exception_if_processing_interrupted()
