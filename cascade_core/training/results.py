"""The files that a run writes: its result, the raw weights without averaging, and intermediate weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..file_names import numbered
from ..writing import move_to_free, temporary_file
from .data.pictures import TrainingPicture
from .file_metadata import file_metadata
from .loop import Loop
from .run_folder import raw_file
from .settings import Settings
from .tasks.base import State
from .tasks.stage_c import StageCTask

SAVED = "saved"  # in the run's folder


class Results:
    """Writes a run's final and intermediate weights.

    pictures: those that were trained on; keep_existing: the result does not replace an existing file.
    """

    def __init__(self, settings: Settings, pictures: Sequence[TrainingPicture], keep_existing: bool = False):
        self.settings, self.pictures, self.keep_existing = settings, pictures, keep_existing

    def write(self, loop: Loop[StageCTask]) -> Path:
        """Writes `output.file`, and beside it the raw weights if the settings ask for them."""
        path = Path(self.settings.output.file)
        if self.settings.output.raw:
            self._write(loop, loop.task.trained.state_dict(), raw_file(path))
        return self._write(loop, loop.state, path)

    def _write(self, loop: Loop[StageCTask], state: State, path: Path) -> Path:
        metadata = file_metadata(self.settings, loop.step, self.pictures)
        if not (self.keep_existing and loop.processes.is_main_process):
            loop.task.write(state, path, metadata)
            return path
        with temporary_file(path.parent) as temporary:
            loop.task.write(state, temporary, metadata)
            return move_to_free(temporary, numbered(path))

    def save(self, loop: Loop[StageCTask]) -> None:
        """Writes the weights of this step into the run's folder, and removes those of all but the last steps kept."""
        output = self.settings.output
        folder, stem = loop.folder / SAVED, Path(output.file).stem
        path = folder / f"{stem}-{loop.step:08}.safetensors"
        if loop.processes.is_main_process:
            folder.mkdir(exist_ok=True)
        metadata = file_metadata(self.settings, loop.step, self.pictures)
        loop.task.write(loop.state, path, metadata)
        if output.raw:
            loop.task.write(loop.task.trained.state_dict(), raw_file(path), metadata)
        if output.keep_last is not None and loop.processes.is_main_process:
            own = re.compile(re.escape(stem) + r"-(\d{8})(_raw)?\.safetensors")
            files = [(match[1], each) for each in folder.iterdir() if (match := own.fullmatch(each.name))]
            kept = sorted({step for step, _ in files if int(step) <= loop.step})[-output.keep_last :]
            for step, file in files:
                if step not in kept and int(step) <= loop.step:
                    # Windows refuses it while a program has it open: then the next save tries again.
                    with suppress(PermissionError):
                        file.unlink()
