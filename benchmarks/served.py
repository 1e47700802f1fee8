"""Speed of pictures as users have them: from a real ComfyUI server, its own nodes beside this pack's, and without it.

    python benchmarks/served.py [CHECKOUT ...] [--rows ours,native] [--memory all,16,12,8,6,4] [--flags=--lowvram]
                                [--quick] [--budget SECONDS] [--profile] [--folder FOLDER] [--json FILE]
    python benchmarks/served.py [CHECKOUT ...] --table [--resume] …       all rows and promises of served_targets.py

Published sizes with random weights, 1024 × 1024, 20 + 10 steps, guidance in both stages, with the server's defaults
and a listening browser. Each row has its own process:

ours      this pack's example for the published files
int8      the same with Stage C's and B's weights in 8 bits
mixed     ComfyUI's samplers and decoder on this pack's MODELs and VAE
native    ComfyUI's own nodes
headless  the example by `cascade run`'s machinery in a warm process without ComfyUI, bf16
cold      ours, but its first picture alone, with no kernel compiled before

and its columns, in seconds from the start of a queued graph to its end, as the server tells them:

seed, prompt  until the picture is in main memory, for a new seed, and for a new prompt too: medians
png           what a preview adds to that
first         the first picture of the process, which loads the files; * where kernels were compiled for it
GB copied     from main memory to the card for one warm picture of a new seed after the timed ones, whoever copies it:
              the driver's copies, as torch's profiler has them. Memory that kernels read over the bus is not in it
at 25, 12     predicted, not measured: the seconds of a new seed over a bus of 25 and 12 GB/s (PCIe 4.0 and 3.0). Copies
              that were waited for take longer in proportion; others stay hidden while there are kernels beside them

Memory (GB) is taken away by another process, and the program is told that its card has no more than what is left.

CHECKOUT is a folder of ComfyUI, or several; its packages are those of the Python that runs this, or of CHECKOUT/.venv.
By default those of COMFYUI_PATH or ~/comfyui. A row that fails is reported, and the others go on. Past --budget seconds
none begins or goes on. Rows that --json holds already stay there unless they are measured anew; with --resume that is
only done where they failed or are of another version of this pack.

--profile also tells where the time of the first and of a warm picture goes: by node, and by function.
--toy     tiny networks on the processor; ComfyUI's own nodes know no such networks, and fail.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat

import served_programs
import served_targets
from cascade_nodes import __version__
from cascade_nodes.cascade_core.writing import output_file, write_file
from copies import BUSES, Traced
from machine import describe_machine, print_table
from memory import BIG_G, TOY_TEXT
from networks import tiny
from served_graphs import PACK, ROWS, Graph, in_main_memory, made_small, with_png
from served_programs import Program
from served_targets import TABLE

PROMPTS = (
    "a lighthouse on a rocky coast",
    "a red fox in the snow",
    "an old harbour at dawn",
    "a bowl of cherries",
)
RUNS, QUICK_RUNS = 5, 2
LONG = 15.0  # seconds of a picture from which medians use only QUICK_RUNS
COLD = "cold"
KINDS = (*ROWS, COLD)
Row = dict[str, Any]


class Pictures:
    """Pictures of one row, each of a new seed."""

    def __init__(self, program: Program, graph: Callable[[int, str], Graph], toy: bool):
        self.program, self.graph, self.toy = program, graph, toy
        self.seed = 0

    def seconds(self, text: str, ending: Callable[[Graph], Graph] = in_main_memory) -> float:
        self.seed += 1
        graph = ending(self.graph(self.seed, text))
        return self.program.seconds(made_small(graph) if self.toy else graph)


def measure(pictures: Pictures, row: Row, options: argparse.Namespace) -> None:
    """Fills a row, keeping figures up to a failure: the first picture, then medians after two warm-ups."""
    program, text = pictures.program, PROMPTS[0]
    row |= program.description()
    with profiled(program, row, "first_profile", options.profile):
        row["first"] = pictures.seconds(text)
    if row["who"] == COLD:
        return
    for _ in range(1 if options.quick else 2):
        pictures.seconds(text)
    times: dict[str, list[float]] = {"seed": [], "prompt": [], "png": []}
    row["times"] = times

    def median(
        quantity: str, ending: Callable[[Graph], Graph] = in_main_memory, prompts: Sequence[str] = ()
    ) -> float:
        nonlocal text
        taken = times[quantity]
        while len(taken) < options.runs and (len(taken) < QUICK_RUNS or sum(taken) < LONG):
            text = prompts[len(taken) % len(prompts)] if prompts else text
            taken.append(pictures.seconds(text, ending))
        return statistics.median(taken)

    row["seed"] = median("seed")
    row["prompt"] = median("prompt", prompts=PROMPTS[1:])
    row["png"] = median("png", with_png) - row["seed"]
    if program.picture is not None:
        row["picture"] = describe_picture(program.picture)
    with profiled(program, row, "warm_profile", options.profile):
        pictures.seconds(text)
    row |= measure_copies(pictures, text, row["seed"])


class profiled:  # noqa: N801 (a context manager)
    """Context that stores a time profile of its pictures in the row, if requested."""

    def __init__(self, program: Program, row: Row, name: str, asked: bool):
        self.program, self.row, self.name, self.asked = program, row, name, asked

    def __enter__(self) -> None:
        if self.asked:
            self.program.measuring("start", "nodes")

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.asked and kind is None:
            self.row[self.name] = self.program.measuring("finish", "")


def describe_picture(path: Path) -> dict[str, float]:
    """Bytes of the PNG, and the spread of its values of 255: one colour would take a PNG less time than a picture."""
    with Image.open(path) as image:
        return {"png_bytes": path.stat().st_size, "deviation": statistics.fmean(ImageStat.Stat(image).stddev)}


def measure_copies(pictures: Pictures, text: str, seconds: float) -> Row:
    """GB that one picture copies to the card, and seconds predicted for slower buses."""
    program = pictures.program
    trace = program.base / "trace.json"
    try:
        told = program.measuring("start", "copies")
        if "error" not in told:
            pictures.seconds(text)
            told = program.measuring("finish", str(trace))
        if "error" in told:
            return {"copies_missing": told["error"]}
        traced = Traced(trace)
        return {
            "copies": traced.summary(),
            "predicted": {str(bus): seconds + traced.slower(bus) for bus in BUSES},
        }
    except (RuntimeError, OSError, ValueError) as error:  # the row's other figures are kept
        return {"copies_missing": f"{type(error).__name__}: {error}"[:600]}
    finally:
        trace.unlink(missing_ok=True)


def run_row(
    row: Row, checkout: Path | None, base: Path, options: argparse.Namespace, deadline: float
) -> None:
    """Measures a row; stores an error in it."""
    begun = time.monotonic()
    try:
        with served_programs.ballast(row["memory"]), ExitStack() as stack:
            if row["who"] == COLD:
                served_programs.forget_kernels(base, checkout)
            flags = [*row["flags"], *(["--cpu"] if options.toy else [])]
            program = served_programs.start(row["who"], checkout, base, flags, row["memory"], deadline)
            stack.callback(program.stop)
            row["compiled"] = program.compiled
            graph = ROWS["ours" if row["who"] == COLD else row["who"]]
            measure(Pictures(program, graph, options.toy), row, options)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    row["row_seconds"] = time.monotonic() - begun


def rows_of(options: argparse.Namespace) -> Iterator[tuple[Row, Path | None]]:
    """Rows to measure, with their checkouts; the row without ComfyUI occurs once for each amount of memory."""
    asked = [(who, memory, options.flags) for memory in options.memory for who in options.rows]
    for who, memory, flags in TABLE if options.table else asked:
        if who == "headless":
            yield {"who": who, "comfyui": None, "memory": memory, "flags": []}, None
        elif who != COLD or memory is None:
            for checkout in options.checkouts:
                version = served_programs.version_of(checkout)
                if not options.table or served_programs.knows(checkout, flags):
                    yield {"who": who, "comfyui": version, "memory": memory, "flags": list(flags)}, checkout


def key(row: Row) -> tuple[Any, ...]:
    return row["who"], row["comfyui"], row["memory"], tuple(row["flags"])


def store(results: dict[str, Any], row: Row, path: Path | None) -> None:
    """Replaces an earlier result of the same row, and writes the file."""
    row |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    row |= {name: results[name] for name in ("machine", "pack")}
    results["rows"] = [*(other for other in results["rows"] if key(other) != key(row)), row]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(results, indent=1) + "\n")


def name_of(row: Row) -> str:
    memory = "all" if row["memory"] is None else f"{row['memory']:g} GB"
    return " ".join(filter(None, [row["who"], row["comfyui"], memory, *row["flags"]]))


def report(rows: list[Row]) -> None:
    table = []
    for row in rows:
        memory = "all" if row["memory"] is None else f"{row['memory']:g} GB"
        columns = [f"{row[name]:.2f}" if name in row else "" for name in ("seed", "prompt", "png", "first")]
        columns[-1] += "*" if columns[-1] and not row.get("compiled") and row["who"] != "native" else ""
        columns.append(f"{row['copies']['gb']:.2f}" if "copies" in row else "")
        columns += [f"{row['predicted'][str(bus)]:.2f}" if "predicted" in row else "" for bus in BUSES[::-1]]
        first, *last = row.get("error", "").strip().splitlines() or [""]
        error = f"{first[:60]} … {last[-1][:60]}" if last else first[:120]
        table.append([row["who"], row["comfyui"] or "", memory, " ".join(row["flags"]), *columns, error])
    buses = [f"at {bus} GB/s, predicted" for bus in BUSES[::-1]]
    head = [
        "nodes",
        "ComfyUI",
        "memory",
        "flags",
        "new seed",
        "new prompt",
        "PNG",
        "first",
        "GB copied",
        *buses,
        "",
    ]
    print_table(head, table)
    for row in rows:
        if row.get("picture", {}).get("deviation", 255) < 1:
            print(
                f"{name_of(row)}: the picture is of one colour, so that its PNG takes less time than others'"
            )
        if "copies_missing" in row:
            print(f"{name_of(row)}: copies are not known: {row['copies_missing'].strip().splitlines()[-1]}")
        for picture in ("first", "warm"):
            if profile := row.get(f"{picture}_profile"):
                print(f"\n{name_of(row)}, the {picture} picture")
                report_profile(profile)


def report_profile(profile: dict[str, Any]) -> None:
    for node, seconds in profile.get("nodes", {}).items():
        print(f"{seconds:8.3f} s  {node}")
        for name, inclusive, own in profile["functions"].get(node, ()) if seconds >= 0.1 else ():
            print(f"{inclusive:16.3f} s  {name} ({own:.3f} its own)")


def amounts(text: str) -> list[float | None]:
    return [None if each == "all" else float(each) for each in text.split(",")]


def kinds(text: str) -> list[str]:
    if unknown := [kind for kind in text.split(",") if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(KINDS)}")
    return text.split(",")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="CHECKOUT")
    parser.add_argument("--rows", type=kinds, default=["ours", "mixed", "native"], help="by commas")
    parser.add_argument("--memory", type=amounts, default=[None], help="GB by commas, or all")
    parser.add_argument("--flags", type=str.split, default=[], help="of the server, by spaces")
    parser.add_argument("--table", action="store_true", help="all rows of the promises")
    parser.add_argument("--resume", action="store_true", help="only rows that --json has not")
    parser.add_argument("--runs", type=int, help=f"pictures of each median, default: {RUNS}")
    parser.add_argument("--quick", action="store_true", help=f"medians of {QUICK_RUNS}")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, files included")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the random files here")
    parser.add_argument("--json", type=output_file, help="also keep the numbers here")
    options = parser.parse_args()
    options.runs = options.runs or (QUICK_RUNS if options.quick else RUNS)
    options.checkouts = [path.resolve() for path in options.checkouts]
    if not options.checkouts and options.rows != ["headless"]:
        from cascade_nodes.tests.comfyui.checkout import find_checkouts

        options.checkouts = [checkout.path.resolve() for checkout in find_checkouts()]
    return options


def pack_version() -> str:
    """This project's commit, where git is at hand, and else its version."""
    command = ["git", "-C", str(PACK), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__


def configurations(toy: bool) -> dict[str, Any]:
    """Configurations of the networks, if not the published ones."""
    if not toy:
        return {"text": BIG_G}
    small = tiny(torch.device("cpu")).configs
    width = TOY_TEXT["hidden_size"]
    return {
        **small,
        "stage_c": {**small["stage_c"], "c_clip_text": width, "c_clip_text_pooled": width},
        "stage_b": {**small["stage_b"], "c_clip": width},
        "text": TOY_TEXT,
        "previewer": {"c_hidden": 16},
    }


def main() -> int:
    options = parse()
    begun = time.monotonic()
    results: dict[str, Any] = {"rows": []}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    results |= {"machine": describe_machine(), "pack": pack_version()}
    measured, left_out, longest = [], [], 0.0
    with ExitStack() as stack:
        base = (options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        served_programs.write_files(base, configurations(options.toy))
        served_programs.link_pack(base)
        print(f"{results['machine']}\nfiles: {time.monotonic() - begun:.0f} s", flush=True)
        there = set()
        if options.resume:
            own = [row for row in results["rows"] if row.get("pack") == results["pack"]]
            there = {key(row) for row in own if "error" not in row}
        for row, checkout in rows_of(options):
            if key(row) in there:
                continue
            if time.monotonic() - begun + longest > options.budget:
                left_out.append(name_of(row))
                continue
            run_row(row, checkout, base, options, begun + options.budget)
            longest = max(longest, row["row_seconds"])
            measured.append(row)
            if time.monotonic() - begun > options.budget:
                # A row that was cut off must not replace a complete one.
                left_out.append(name_of(row))
            else:
                store(results, row, options.json)
            shown = {name: value for name, value in row.items() if not name.endswith("_profile")}
            print(f"{name_of(row)}: {json.dumps(shown)}", flush=True)
    shown = results["rows"] if options.table else measured
    print()
    report(shown)
    met = True
    if options.table:
        print()
        met = served_targets.report(shown)
    if left_out:
        print(f"\nLEFT OUT, since {options.budget:g} seconds were over: {'; '.join(left_out)}")
    return 0 if met and not left_out and not any("error" in row for row in shown) else 1


if __name__ == "__main__":
    sys.exit(main())
