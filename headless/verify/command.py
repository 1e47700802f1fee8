"""`cascade verify [FOLDER]`: the command line, the order of the work, and its table.

Nothing heavy is imported before the command runs, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cascade_core.errors import escaped

if TYPE_CHECKING:
    from ..progress import TransferProgress
    from .report import Report

ABOUT = (
    "Reads every file of Stable Cascade that is found: its checksum, what it holds, weights that are not finite, what "
    "its networks give for fixed inputs. Then makes one picture. Where diffusers is installed, its networks and "
    "pipelines get the same weights, inputs and noise, and the differences are told. Nothing is downloaded or sent; "
    "the JSON file names files, but no folders."
)
DTYPES = ("auto", "bf16", "fp16", "fp32")


def add_verify_command(commands: Any) -> None:
    about = "check the model files that are here, for an issue"
    verify = commands.add_parser("verify", help=about, description=ABOUT)
    where = "a models folder, any folder of files, or one of diffusers; default: where `cascade models` looks"
    verify.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help=where)
    small = "a picture of 512×512 in 8 + 4 steps instead of 1024×1024 in 20 + 10"
    verify.add_argument("--quick", action="store_true", help=small)
    verify.add_argument("--no-picture", action="store_true", help="check files and networks alone")
    output = "where the JSON file and the picture go, default: here"
    verify.add_argument("--output", type=Path, default=Path(), metavar="DIR", help=output)
    verify.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of Stage B and C in the picture"
    )
    verify.add_argument(
        "--device", default="auto", help="device for the picture: auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
    )
    memory = "how much of the GPU's memory the picture takes, such as 6GB, default: what is free"
    verify.add_argument("--memory", metavar="SIZE", help=memory)
    prefer = "which of several networks makes the picture"
    verify.add_argument("--prefer", choices=("full", "lite"), default="full", help=prefer)
    verify.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    verify.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from ...cascade_core.placement import parse_bytes
    from ...cascade_core.stages.device import chosen_device
    from ..progress import TransferProgress
    from .files import roots_of, safetensors_in
    from .report import Report

    chosen_device(options.device)  # before the work, since the error is the command line's
    if options.memory is not None:
        parse_bytes(options.memory)
    paths = safetensors_in(options.folder)
    report = Report(roots_of(options.folder), options.output)
    progress = TransferProgress(results=sys.stderr)
    try:
        _fill(report, paths, options, progress)
    except KeyboardInterrupt:
        progress.close()
        report.write()
        print(escaped(f"What was done so far is in {report.json_path}."), file=sys.stderr)
        raise
    finally:
        progress.close()
    for line in table(report):
        print(escaped(line))
    return 1 if report.problems else 0


def _fill(report: Report, paths: list[Path], options: argparse.Namespace, progress: TransferProgress) -> None:
    """Does the work; only an interruption ends it early."""
    from .check_picture import check_picture
    from .files import check_file, shown_name
    from .in_diffusers import load_diffusers
    from .picture import PictureRun

    library: Any = None
    with report.recording("diffusers"):
        library = load_diffusers()
        report.data["diffusers"] = library and library.__version__
    total = len(paths) + (not options.no_picture)
    for index, path in enumerate(paths, start=1):
        with _timed(progress, index, total, shown_name(path)), report.recording(shown_name(path), path):
            check_file(report, path, library, progress)
        report.write()
    if not options.no_picture:
        run = PictureRun.small() if options.quick else PictureRun()
        choices = options.prefer, options.dtype, options.device, options.memory
        with _timed(progress, total, total, "picture"), report.recording("The picture"):
            check_picture(report, run, *choices, library, progress)
    report.data["finished"] = True
    report.write()


@contextmanager
def _timed(progress: TransferProgress, index: int, total: int, name: str) -> Iterator[None]:
    begun = time.perf_counter()
    progress.node_started(index, total, name)
    yield
    progress.node_finished(time.perf_counter() - begun)


def table(report: Report) -> list[str]:
    """The report in lines for a terminal."""
    lines = [line for file in report.data["files"] for line in _file_lines(file)]
    lines += _picture_lines(report.data["picture"])
    if report.data["others"]:
        lines.append(f"{report.data['others']} files of other models, of LoRAs or in shards were left alone.")
    if not report.data["diffusers"]:
        lines.append("diffusers is not installed here: nothing was compared with it.")
    lines += [f"WRONG: {problem}" for problem in report.problems]
    count = f"{len(report.problems)} wrong" if report.problems else "Nothing is wrong"
    return [*lines, f"{count}. Please paste {report.json_path} into an issue."]


def _file_lines(file: dict[str, Any]) -> Iterator[str]:
    published = f"  {' and '.join(file['published'])}" if file["published"] else ""
    yield f"{file['file']}  {file['size'] / 1e6:,.1f} MB  sha256 {file['sha256'][:16]}…{published}"
    for network in file["networks"]:
        yield f"  {network['what']}: {network['tensors']} tensors in {' and '.join(network['dtypes'])}"
        for name, output in network.get("outputs", {}).items():
            theirs = output.get("diffusers")
            apart = (
                f"; differs from diffusers' by {theirs['relative']} of the largest value" if theirs else ""
            )
            yield f"    {name}: {_in_numbers(output)}{apart}"


def _picture_lines(picture: dict[str, Any]) -> Iterator[str]:
    if "skipped" in picture:
        yield f"No picture was made: {picture['skipped']}"
    if "file" in picture:
        seconds = sum(picture["seconds"].values())
        where = f"{picture['dtype']} on {picture['device']}, {seconds:.1f} s"
        yield f"{picture['file']}  {where}: {_in_numbers(picture['pixels'])}"
    if theirs := picture.get("diffusers"):
        numbers = f"{theirs['seconds']:.1f} s: {_in_numbers(theirs['pixels'])}"
        yield f"{theirs['file']}  by diffusers, {numbers}"
        relative = theirs["latent"]["relative"]
        yield f"  differ by {relative} of the largest value in Stage C's latent; PSNR in pixels {theirs['psnr']} dB"
        yield f"  {theirs['same']}"
        yield f"  {theirs['not_the_same']}"


def _in_numbers(output: dict[str, Any]) -> str:
    return f"mean {output['mean']}, std {output['std']}, digest {output['digest']}"
