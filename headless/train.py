"""`cascade train TASK CONFIG.yaml`: settings read, networks found as the loaders do, progress on one line."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .signals import REPEATED, STOPPING, Stopped, handling

if TYPE_CHECKING:
    from torch import Tensor

    from ..cascade_core.training.loop import TrainingProgress
    from ..cascade_core.training.settings import TaskName

FACES = 4  # of a picture, as published


def run_training(
    task: TaskName, path: Path, fresh: bool = False, dry: bool = False, preset: str | None = None
) -> int:
    """Trains, with progress on standard error. Returns the exit status: 0, or 128 + the signal that stopped the run."""
    # Before torch is imported: with this workspace, cuBLAS is deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from ..cascade_core.errors import CascadeError
    from ..cascade_core.training.dry_run import dry_run
    from ..cascade_core.training.launch import launched_with_others, share_failure
    from ..cascade_core.training.run import train
    from ..cascade_core.training.settings import read_settings, resolve
    from .trial import how_to_try

    line = ProgressLine()
    folder = path.resolve().parent
    try:
        settings = resolve(read_settings(path, task, preset), folder, finder(folder))
    except CascadeError as error:
        if dry or not launched_with_others():
            raise
        line.notify(f"error: {error}")
        share_failure(error)
        leave_group(together=False)
        return 1
    fast = settings.train.precision != "fp32"  # fp32: products are computed in float32 too, not in TF32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    if dry:
        dry_run(settings, line.notify)
        return 0
    with recording_signals() as signals:
        try:
            outcome = train(
                settings, line.notify, line.progress, line.caching, lambda: bool(signals), fresh, find_faces
            )
        except BaseException:
            leave_group(together=False)
            raise
        leave_group()
    main = os.environ.get("RANK", "0") == "0"  # of several processes, one says how
    if main and outcome.file is not None and outcome.seconds:  # else the run was finished already
        line.notify(how_to_try(settings, outcome.file))
    # Of several processes, only one may have received the signal.
    return 0 if outcome.finished else 128 + next(iter(signals), signal.SIGINT)


def leave_group(together: bool = True) -> None:
    """Ends the threads through which processes communicate; at Python's exit they would abort the process.

    together: whether all processes reach this point, so that none leaves while another still needs it.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # reference cycles of the run hold the group
        if together:
            distributed.barrier()
        distributed.destroy_process_group()


def finder(folder: Path) -> Callable[[str, str], Path]:
    """A function that finds networks by name: beside the settings file, or where loaders look."""
    from ..nodes.hosts.headless.folders import find_file

    def find(role: str, name: str) -> Path:
        beside = folder / name
        return beside if os.path.exists(beside) else find_file(role, name)  # also for a name that is too long

    return find


@contextmanager
def recording_signals() -> Iterator[list[int]]:
    """Yields the list of signals that ask to stop (Ctrl-C, a scheduler's SIGTERM); a second ends the run at once."""
    signals: list[int] = []
    first = 0.0

    def record(number: int, frame: Any) -> None:
        nonlocal first
        if signals and time.monotonic() - first > REPEATED:
            raise Stopped(number)
        first = first or time.monotonic()
        signals.append(number)

    # None: handled by a library outside of Python, whose handler could not be restored.
    stopping = [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    with handling((signal.SIGINT, *stopping), record):
        yield signals


def find_faces(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Finds each picture's (3, H, W) faces by InsightFace: yields their embeddings and boxes."""
    from ..nodes.faces import find_faces

    for faces in find_faces(images.movedim(1, -1), max_faces=FACES):
        yield faces.embeddings, faces.boxes


class ProgressLine:
    """A status line on standard error that is overwritten; separate lines where that is not a terminal."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.width = 0

    def notify(self, text: str) -> None:
        self.close()
        print(text, file=sys.stderr, flush=True)

    def caching(self, done: int, total: int) -> None:
        if self.live or done == total:
            self._show(f"encoded {done}/{total}")

    def progress(self, progress: TrainingProgress) -> None:
        from ..cascade_core.training.log import duration

        p = progress
        left = duration(p.seconds_left) if p.seconds_left is not None else "?"
        held_out = f"  held out {p.validation:.4g}" if p.validation is not None else ""
        self._show(
            f"step {p.step}/{p.steps}  loss {p.loss:.4g}{held_out}  {p.steps_per_second:.3g} steps/s  {left} left"
        )

    def _show(self, text: str) -> None:
        if self.live:
            print(f"\r{text.ljust(self.width)}", end="", file=sys.stderr, flush=True)
            self.width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line that is overwritten."""
        if self.width:
            print(file=sys.stderr)
            self.width = 0
