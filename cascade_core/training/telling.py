"""Sentences for the user at the beginning and end of a run."""

from pathlib import Path

from ..accelerators import device_name
from ..errors import counted
from ..networks.precision import PRECISIONS
from .frozen import parameter_count
from .loop import Loop
from .tasks.stage_c import StageCTask


def at_beginning(
    loop: Loop[StageCTask], steps_per_epoch: int, rows_per_epoch: int, file: str, preset: str | None = None
) -> str:
    """Device and precision, what is trained, pictures per step, and the files that the run writes.

    steps_per_epoch: batches of an epoch; rows_per_epoch: pictures in them; preset: its name, if one was used.
    """
    task, train, processes = loop.task, loop.settings.train, loop.processes.num_processes
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == task.dtype)
    stage = "Stage C" if task.kind == "stage_c" else "Stage B"
    trained = loop.trained_numbers
    whole = parameter_count(task.network)
    size = train.batch_size * train.accumulate * processes
    mean = rows_per_epoch / max(steps_per_epoch, 1) * train.accumulate
    fewer = f", {_shown(mean)} on average, as buckets hold fewer" if mean < 0.95 * size else ""
    factors = f"{train.batch_size} × {train.accumulate} accumulated × {counted(processes, 'process', 'es')}"
    divided = f", the network divided among {processes} (train.fsdp)" if task.shards is not None else ""
    epoch = steps_per_epoch / train.accumulate
    rounds = train.steps / epoch
    by = f", by the preset {preset}" if preset else ""
    return (
        f"Training on {device_name(task.device)} in {precision}{by}, {counted(processes, 'process', 'es')}{divided}: "
        f"{trained:,} trained numbers beside {stage}'s {whole:,}. A step takes {counted(size, 'picture')} "
        f"({factors}){fewer}; an epoch is {about(epoch, 'step')}, and the run has "
        f"{counted(train.steps, 'step')}, {about(rounds, 'epoch')}. Checkpoint, log and samples go to "
        f"{loop.folder}, the result to {file}."
    )


def about(number: float, noun: str) -> str:
    """A rounded number of things, singular where 1 is shown."""
    return f"{_shown(number)} {noun}{'s' * (_shown(number) != '1')}"


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def at_end(loop: Loop[StageCTask], path: Path) -> str:
    """The result's file and its contents."""
    averaged = f", averaged over steps (train.ema {loop.settings.train.ema:g})" if loop.average else ""
    size = path.stat().st_size
    on_disk = f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
    return f"Wrote {path}: {loop.task.described} after {counted(loop.step, 'step')}{averaged}, {on_disk}."
