"""A run's folder: locked by one run at a time, and holding no other run's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CascadeError, counted, printable
from .data.held_out import FoundPictures
from .identity import (
    contents_of,
    differences,
    other_processes,
    pictures_named,
    refusal,
    same_file,
    saved,
    shared_settings,
    unknown_parts,
)
from .launch import computing
from .optimisers import learning_rate
from .processes import Processes
from .settings import Settings
from .state import STATE, read_state, step_of

LOCK = ".lock"
Notify = Callable[[str], None]  # takes sentences for people


def cache_of(settings: Settings) -> str:
    return settings.data.cache or f"{settings.output.folder}/cache"


def raw_file(path: Path) -> Path:
    """The path of the raw weights without averaging, beside a file of averaged ones."""
    return path.with_name(f"{path.stem}_raw{path.suffix}")


@contextmanager
def locked(folder: Path, notify: Notify) -> Iterator[None]:
    """Locks a run's folder inside the block. The system releases the lock with the process; the lock file may stay."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CascadeError(
            f"Another training runs in {folder}; wait for its end, or give this one an output.folder of its own."
        ) from None
    except (OSError, NotImplementedError) as error:
        notify(f"{folder} cannot be locked ({error}); let no other training run in it at the same time.")
    try:
        yield
    finally:
        lock.release()


def compare_settings(settings: Settings, processes: Processes) -> None:
    """Raises CascadeError, the same in all processes, where their settings differ."""
    processes.compare(shared_settings(settings) | computing(settings.train.precision, processes.device))


def compared(
    settings: Settings, pictures: FoundPictures, processes: Processes, ask: Callable[[], None]
) -> dict[str, str]:
    """The main process's `contents_of`, after all processes have compared theirs; nothing is loaded yet.

    ask: called from time to time; raises Interrupted. Raises CascadeError, the same in all, where they differ.
    """
    contents: dict[str, str] = {}
    held_out: dict[str, str] = {}  # compared, but not part of a run's identity

    def read() -> None:
        if processes.is_local_main_process:  # once per machine
            cache = cache_of(settings)
            contents.update(contents_of(settings, pictures.trained, cache, processes.num_processes, ask))
            if processes.num_processes > 1:
                held_out["held-out pictures"] = pictures_named(settings, pictures.held_out, cache, ask)

    processes.on_each(read)
    processes.compare(contents | held_out)
    return contents


def begun(settings: Settings, contents: dict[str, str], notify: Notify, fresh: bool) -> Path | None:
    """Compares the run folder's state with the settings, before anything is loaded or encoded.

    contents: of `identity`. Returns the file of the result if the run is finished already. Raises CascadeError where
    the settings would lead to another result than those of the state.
    """
    path = Path(settings.output.folder or "") / STATE
    if fresh or not path.exists():
        return None
    _, metadata = read_state(path)
    if differing := differences(settings, contents, metadata):
        raise refusal(path, differing)
    if unknown := unknown_parts(metadata):
        notify(
            f"{path} is of an earlier version and does not tell its {' and '.join(unknown)}; they are taken as given."
        )
    if (others := other_processes(contents, metadata)) is not None:
        notify(
            f"{path} is of {printable(others)} processes, and {contents['processes']} go on with it; a step takes as "
            "many times train.batch_size, so the result is not that of a run by either."
        )
    step, steps, before = step_of(metadata, path), settings.train.steps, saved(metadata)
    if step > steps:
        raise CascadeError(
            f"{path} is at step {step}, but train.steps is {steps}, and a run does not go back; give at least {step}, "
            "or begin anew with --fresh."
        )
    if before is not None and before.train.steps != steps:
        looked_at = (0, step // 2, step - 1) if step else ()
        then, now = (
            [learning_rate(each, train) for each in looked_at] for train in (before.train, settings.train)
        )
        shape = (
            f"; from here on the learning rate follows the {settings.train.schedule} of {counted(steps, 'step')}, so "
            f"the result is not that of a run of {counted(steps, 'step')} from its beginning"
        )
        notify(f"train.steps was {before.train.steps} and is {steps} now{shape * (then != now)}.")
    file = Path(settings.output.file)
    files = (file, raw_file(file)) if settings.output.raw else (file,)
    written = all(each.is_file() and each.stat().st_mtime_ns >= path.stat().st_mtime_ns for each in files)
    finished = step == steps and written and same_file(settings, metadata)
    return file if finished else None
