"""`cascade batch`: arguments, and a batch from start to end."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cascade_core.errors import CascadeError, excerpt, printable, quoted
from ..signals import Stopped

if TYPE_CHECKING:
    from ..registry import InputInfo
    from .driver import Summary
    from .journal import Journal
    from .plan import Plan
    from .progress import BatchProgress
    from .rows import Row, Sheet
    from .work import Crew

_EPILOG = """rows:
  A table is lines of JSON, CSV or Parquet. Its columns are inputs of the graph, NODE.INPUT by id, class or title,
  `seed` for all seeds, and `name` for the pictures. For null or an empty cell the graph's own value stays.

    {"name": "star", "CascadeTextEncode.positive": "a red star", "seed": 7}

  The same command goes on with a batch that was stopped: rows whose pictures are there are not made again.
  Exit status: 0, 1 where a row could not be made, 130 after Ctrl-C.

examples:
  cascade batch graph.json prompts.csv --output pictures
  cascade batch graph.json --output pictures --grid seed=1,2,3 CascadePriorSampler.cfg=2,4,6
  cascade batch graph.json prompts.jsonl --output pictures --shard 3/8
  cascade batch graph.json prompts.jsonl --output pictures --workers 2
  cascade batch graph.json prompts.jsonl --output pictures --server http://gpu1:8188 http://gpu2:8188
"""
_MOST_SHARDS = 1_000_000
_MOST_FAILURES = 20  # listed at the end
_MANY = 1_000  # rows, whose checks take seconds


def add_batch_command(commands: Any) -> None:
    batch = commands.add_parser(
        "batch",
        help="execute a graph for each row of a table",
        description="Executes a graph for each row of a table, and keeps models loaded between them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("graph", type=Path, metavar="GRAPH", help="as `cascade run` takes it")
    batch.add_argument("rows", type=Path, nargs="?", metavar="ROWS", help="a table: .jsonl, .csv or .parquet")
    batch.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where pictures go, and batch.jsonl, the list of finished rows",
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
    _add_workers(batch)
    batch.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    batch.set_defaults(command=run_batch)


def _add_workers(batch: argparse.ArgumentParser) -> None:
    """Options for who makes the rows: one process of several, servers, or workers of Ray."""
    batch.add_argument(
        "--shard",
        type=_shard,
        metavar="K/N",
        help="make only rows K, K + N, …, as one of N processes; default: RANK and WORLD_SIZE, where they are set",
    )
    batch.add_argument(
        "--server",
        nargs="+",
        action="extend",
        default=[],
        metavar="URL",
        help="run on these ComfyUIs, one row at a time on each, instead of in this process",
    )
    batch.add_argument(
        "--workers",
        type=_count_of_workers,
        metavar="N",
        help="run in this many processes of Ray (pip install 'cascade-nodes[cluster]'); default: one for each GPU",
    )
    batch.add_argument(
        "--gpus-per-worker",
        type=_gpus,
        metavar="G",
        help="GPUs of each worker, or a part of one; default: 1, else 0",
    )
    batch.add_argument(
        "--address",
        metavar="auto|HOST:PORT",
        help="join this Ray cluster, whose members may run code here (see SECURITY.md); default: this machine alone",
    )


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= _MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not K/N with K from 1 to N, such as 3/8")
    return int(match[1]), int(match[2])


def _count_of_workers(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of processes, such as 2")
    return int(text)


def _gpus(text: str) -> float:
    """GPUs of a worker: 0, a part of one, or a whole number, as Ray takes them."""
    match = re.fullmatch(r"\d{1,3}(\.\d{1,3})?", text)
    gpus = float(text) if match else -1.0
    if gpus < 0 or (gpus > 1 and not gpus.is_integer()):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of GPUs, such as 1, or 0.5 of one")
    return gpus


def _check_options(options: argparse.Namespace) -> None:
    """Raises CascadeError for combinations in which an option would have no effect."""
    on_ray = options.workers is not None or options.address is not None
    if options.server and on_ray:
        raise CascadeError(
            "--server runs on ComfyUIs, and --workers and --address on Ray; give one or the other."
        )
    if options.server and options.memory:
        raise CascadeError(
            "--memory limits this program alone; start the ComfyUIs of --server with their own options."
        )
    if options.gpus_per_worker is not None and not on_ray:
        raise CascadeError("--gpus-per-worker needs --workers; give the number of workers.")


def run_batch(options: argparse.Namespace) -> int:
    """Runs a batch. Returns the exit status."""
    from ..saving import check_folder
    from ..train import recording_signals
    from .journal import Journal
    from .progress import BatchProgress, listed
    from .sheet import draw_sheets, sheets_that_fit

    _check_options(options)
    rows, sheets = _rows(options)
    in_one_process = not options.server and options.workers is None and options.address is None
    shard = options.shard or (launched_shard(os.environ) if in_one_process else None)
    total = len(rows)
    if shard is not None:
        rows = rows[shard[0] - 1 :: shard[1]]
    check_folder(options.output)
    with ExitStack() as stack:
        signals = stack.enter_context(recording_signals())
        progress = BatchProgress(signals)
        stack.callback(progress.close)
        sheets = sheets_that_fit(sheets, progress)
        if shard is not None and not rows:
            progress.notify(f"None of the {total} rows is in shard {shard[0]}/{shard[1]}.")
        journal = Journal(options.output, shard)
        stack.callback(journal.close)
        try:
            summary = _work(options, rows, journal, progress, stack, whole=shard is None)
        except Stopped:
            progress.notify(f"Dropped {listed(progress.under_way)}; the same command makes what is missing.")
            raise
        draw_sheets(sheets, journal, progress)
    _tell(summary, len(rows), progress)
    if signals and summary.left:
        return 128 + signals[0]
    if summary.failed and "TORCHELASTIC_RUN_ID" in os.environ:
        progress.notify(
            "The exit status is 0 all the same: torchrun ends the other processes at any other status."
        )
        return 0
    return 1 if summary.failed or summary.left else 0


def _rows(options: argparse.Namespace) -> tuple[list[Row], list[Sheet]]:
    from .rows import Row, grid_rows, read_axis, read_rows

    axes = [read_axis(text) for text in options.grid]
    if options.rows is None and not axes:
        raise CascadeError(
            "There are no rows; give a table (.jsonl, .csv or .parquet) or --grid NODE.INPUT=a,b,c."
        )
    rows = [Row("grid")] if options.rows is None else read_rows(options.rows)
    return grid_rows(rows, axes) if axes else (rows, [])


def launched_shard(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """This process's shard from RANK (from 0) and WORLD_SIZE, as set by torchrun and other launchers."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world <= _MOST_SHARDS:
        given = f"RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']}"
        raise CascadeError(
            f"{excerpt(given, 200)} are not a process's number (from 0) and the number of processes; use --shard."
        )
    return (rank + 1, world) if world > 1 else None


def _work(
    options: argparse.Namespace, rows: list[Row], journal: Journal, progress: BatchProgress, stack: ExitStack,
    whole: bool,
) -> Summary:  # fmt: skip
    """Makes the rows. whole: whether they are all of the table, so that a fault of each is the table's, said once"""
    from .driver import Driver, Summary

    place = _on_servers(options, progress) if options.server else _here(options, progress)
    if len(rows) > _MANY:
        progress.notify(f"Checking {len(rows):,} rows before the first is made.")
    plan = place.plan(takewhile(lambda row: not progress.signals, rows), options.assignments, journal)
    if whole and not progress.signals and (fault := plan.fault_of_all):
        raise CascadeError(fault)
    for name, error in plan.faults:
        journal.fail(name, error)
        progress.notify(f"{name}: {error}")
    if plan.done:
        progress.notify(f"{len(plan.done)} of {len(rows)} rows are there already.")
    summary = Summary()
    if progress.signals:
        checked = len(plan.waiting) + len(plan.done) + len(plan.faults)
        summary.left = [*(row.name for row in plan.waiting), *(row.name for row in rows[checked:])]
    elif plan.waiting:
        crew = place.crew()
        stack.callback(crew.close)
        summary = Driver(plan.waiting, crew, journal, progress).run(progress.signals)
    summary.failed[:0] = plan.faults
    return summary


@dataclass(frozen=True)
class _Place:
    """Where graphs run: makes jobs of rows, and workers for them."""

    plan: Callable[[Iterable[Row], list[str], Journal], Plan]
    crew: Callable[[], Crew]


def _on_servers(options: argparse.Namespace, progress: BatchProgress) -> _Place:
    from ..client import Server
    from ..sources import read_source
    from .plan import make_plan, remembering
    from .servers import ServersCrew

    servers = [Server(url) for url in dict.fromkeys(options.server)]
    for server in servers:
        server.get("/queue")  # fails now if the server does not answer
    inputs_of = remembering(servers[0].inputs_of)
    graph = read_source(options.graph, inputs_of).graph

    def plan(rows: Iterable[Row], assignments: list[str], journal: Journal) -> Plan:
        return make_plan(graph, rows, assignments, inputs_of, journal)

    return _Place(plan, lambda: ServersCrew(servers, progress.notify))


def _here(options: argparse.Namespace, progress: BatchProgress) -> _Place:
    """Runs the batch in this process, or in Ray's workers."""
    if options.memory is not None:
        from ...cascade_core.placement import parse_bytes

        parse_bytes(options.memory)
    choose_card(os.environ)
    from ..folders import Folders
    from ..registry import available_nodes, describe
    from ..sources import read_source
    from .plan import checking, make_plan, remembering
    from .work import GraphWorker, LocalCrew

    classes = available_nodes()

    @remembering
    def inputs_of(class_type: str) -> Mapping[str, InputInfo] | None:
        return describe(classes[class_type]).inputs if class_type in classes else None

    graph = read_source(options.graph, inputs_of).graph
    folder = options.graph.parent
    # On a cluster, models and pictures are on its machines, and perhaps not here.
    check = checking(Folders(options.input, options.output, folder)) if options.address is None else None

    def plan(rows: Iterable[Row], assignments: list[str], journal: Journal) -> Plan:
        return make_plan(graph, rows, assignments, inputs_of, journal, check)

    def crew() -> Crew:
        if options.workers is None and options.address is None:
            return LocalCrew(GraphWorker(options.input, folder, options.memory, progress))
        from .on_ray import RayCrew

        arguments = (options.input.resolve(), folder.resolve(), options.memory)
        return RayCrew(options.workers, options.gpus_per_worker, options.address, arguments, progress.notify)

    return _Place(plan, crew)


def choose_card(environment: MutableMapping[str, str]) -> None:
    """Assigns each process of a launcher on this machine its own card, before any card is used."""
    if "LOCAL_RANK" not in environment or launched_shard(environment) is None:
        return
    import torch

    cards = torch.cuda.device_count()
    if cards > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(cards)]
        environment["CUDA_VISIBLE_DEVICES"] = names[int(environment["LOCAL_RANK"]) % cards]


def _tell(summary: Summary, total: int, progress: BatchProgress) -> None:
    """Reports the end of a batch: counts, and again each failed row, since earlier reports may have scrolled away."""
    parts = [f"{len(summary.made)} of {total} rows made"]
    if summary.failed:
        parts.append(f"{len(summary.failed)} could not be made")
    if summary.left:
        parts.append(f"{len(summary.left)} left; the same command goes on with them")
    progress.notify(", ".join(parts) + ".")
    if summary.ended_by:
        progress.notify(f"error: {summary.ended_by}")
    for name, error in summary.failed[:_MOST_FAILURES]:
        progress.notify(f"error: {printable(name)}: {error}")
    if len(summary.failed) > _MOST_FAILURES:
        progress.notify(f"error: … {len(summary.failed)} in all; batch.jsonl lists them.")
