"""`cascade batch`: arguments, and a batch from start to end."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cascade_core.errors import CascadeError, excerpt, printable, quoted
from ..signals import Stopped

if TYPE_CHECKING:
    from ..registry import InputInfo
    from .driver import Summary
    from .journal import Journal
    from .progress import BatchProgress
    from .rows import Row, Sheet

_EPILOG = """rows:
  A table is lines of JSON or CSV. Its columns are inputs of the graph, NODE.INPUT by id, class or title, `seed` for all
  seeds, and `name` for the pictures. What is null or an empty cell stays as the graph has it.

    {"name": "star", "CascadeTextEncode.positive": "a red star", "seed": 7}

  The same command goes on with a batch that was stopped: rows whose pictures are there are not made again.
  Exit status: 0, 1 where a row could not be made, 130 after Ctrl-C.

examples:
  cascade batch graph.json prompts.csv --output pictures
  cascade batch graph.json --output pictures --grid seed=1,2,3 CascadePriorSampler.cfg=2,4,6
  cascade batch graph.json prompts.jsonl --output pictures --shard 3/8
"""
_MOST_SHARDS = 1_000_000
_MOST_FAILURES = 20  # listed at the end


def add_batch_command(commands: Any) -> None:
    batch = commands.add_parser(
        "batch",
        help="execute a graph for each row of a table",
        description="Executes a graph for each row of a table, and keeps models loaded between them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("graph", type=Path, metavar="GRAPH", help="as `cascade run` takes it")
    batch.add_argument("rows", type=Path, nargs="?", metavar="ROWS", help="a table: .jsonl or .csv")
    batch.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where pictures go, and batch.jsonl, what is done",
    )
    batch.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        default=[],
        metavar="NODE.INPUT=A,B,C",
        help="each row with every combination of these values, and a contact sheet of them",
    )
    batch.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NODE.INPUT=VALUE",
        help="give an input another value in all rows, as `cascade run` does",
    )
    batch.add_argument(
        "--input",
        type=Path,
        default=Path("input"),
        metavar="DIR",
        help="where LoadImage looks, as in `cascade run`",
    )
    batch.add_argument(
        "--memory", metavar="SIZE", help="how much of the GPU's memory to take, as in `cascade run`"
    )
    batch.add_argument(
        "--shard",
        type=_shard,
        metavar="K/N",
        help="make the rows K, K + N, … alone, as one of N processes; default: RANK and WORLD_SIZE, where they are set",
    )
    batch.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    batch.set_defaults(command=run_batch)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not K/N with K from 1 to N, such as 3/8")
    return int(match[1]), int(match[2])


def run_batch(options: argparse.Namespace) -> int:
    """Runs a batch. Returns the exit status."""
    from ..saving import check_folder
    from ..train import recording_signals
    from .journal import Journal
    from .progress import BatchProgress, listed
    from .sheet import draw_sheets

    rows, sheets = _rows(options)
    shard = options.shard or launched_shard(os.environ)
    if shard is not None:
        rows = rows[shard[0] - 1 :: shard[1]]
    check_folder(options.output)
    with ExitStack() as stack:
        signals = stack.enter_context(recording_signals())
        progress = BatchProgress(signals)
        stack.callback(progress.close)
        journal = Journal(options.output, shard)
        stack.callback(journal.close)
        try:
            summary = _work(options, rows, journal, progress, stack)
        except Stopped:
            progress.notify(f"Dropped {listed(progress.under_way)}; the same command makes what is missing.")
            raise
        draw_sheets(sheets, journal, progress)
    _tell(summary, len(rows), progress)
    if signals and summary.left:
        return 128 + signals[0]
    if summary.failed and "TORCHELASTIC_RUN_ID" in os.environ:
        progress.notify("The exit status is 0 all the same: torchrun ends the other processes at any other.")
        return 0
    return 1 if summary.failed or summary.left else 0


def _rows(options: argparse.Namespace) -> tuple[list[Row], list[Sheet]]:
    from .rows import Row, grid_rows, read_axis, read_rows

    axes = [read_axis(text) for text in options.grid]
    if options.rows is None and not axes:
        raise CascadeError("There are no rows; give a table (.jsonl or .csv) or --grid NODE.INPUT=a,b,c.")
    rows = [Row("grid")] if options.rows is None else read_rows(options.rows)
    return grid_rows(rows, axes) if axes else (rows, [])


def launched_shard(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """This process's share as torchrun and other launchers say it: RANK from 0, and WORLD_SIZE."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world <= _MOST_SHARDS:
        given = f"RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']}"
        raise CascadeError(
            f"{excerpt(given, 200)} are not a process's number from 0 and their count; use --shard."
        )
    return (rank + 1, world) if world > 1 else None


def _work(
    options: argparse.Namespace, rows: list[Row], journal: Journal, progress: BatchProgress, stack: ExitStack
) -> Summary:
    from ..folders import Folders
    from ..registry import available_nodes, describe
    from ..sources import read_source
    from .driver import Driver
    from .plan import checking, make_plan, remembering
    from .work import GraphWorker, LocalCrew

    if options.memory is not None:
        from ...cascade_core.placement import parse_bytes

        parse_bytes(options.memory)
    _choose_card(os.environ)
    classes = available_nodes()

    @remembering
    def inputs_of(class_type: str) -> Mapping[str, InputInfo] | None:
        return describe(classes[class_type]).inputs if class_type in classes else None

    graph = read_source(options.graph, inputs_of).graph
    folder = options.graph.parent
    check = checking(Folders(options.input, options.output, folder))
    plan = make_plan(graph, rows, options.assignments, inputs_of, journal, check)
    for name, error in plan.faults:
        journal.fail(name, error)
        progress.notify(f"{name}: {error}")
    if plan.done:
        progress.notify(f"{len(plan.done)} of {len(rows)} rows are there already.")
    crew = LocalCrew(GraphWorker(options.input, folder, options.memory, progress))
    stack.callback(crew.close)
    summary = Driver(plan.jobs, crew, journal, progress).run(progress.signals)
    summary.failed[:0] = plan.faults
    return summary


def _choose_card(environment: MutableMapping[str, str]) -> None:
    """Gives each process of a launcher on this machine a card of its own, before any is used."""
    if "LOCAL_RANK" not in environment or launched_shard(environment) is None:
        return
    import torch

    cards = torch.cuda.device_count()
    if cards > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(cards)]
        environment["CUDA_VISIBLE_DEVICES"] = names[int(environment["LOCAL_RANK"]) % cards]


def _tell(summary: Summary, total: int, progress: BatchProgress) -> None:
    """The end of a batch: how many of what, and again each row that could not be made, which may have scrolled away."""
    parts = [f"{len(summary.made)} of {total} rows made"]
    if summary.failed:
        parts.append(f"{len(summary.failed)} could not be made")
    if summary.left:
        parts.append(f"{len(summary.left)} left, with which the same command goes on")
    progress.notify(", ".join(parts) + ".")
    for name, error in summary.failed[:_MOST_FAILURES]:
        progress.notify(f"error: {printable(name)}: {error}")
    if len(summary.failed) > _MOST_FAILURES:
        progress.notify(f"error: … {len(summary.failed)} in all; batch.jsonl lists them.")
