"""Command line: `cascade run GRAPH`, `batch GRAPH ROWS`, `show FILE`, `train TASK CONFIG.yaml`, and more.

Nothing heavy is imported before it is needed, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError, escaped, on_one_line
from .batch.command import add_batch_command
from .convert_lora import add_convert_command
from .merge import CommandParser, add_merge_command
from .signals import INTERRUPTED, Stopped, stopping_on_signals
from .verify.command import add_verify_command

if TYPE_CHECKING:
    from .progress import ConsoleProgress
    from .results import Result

_EXAMPLES = """examples:
  cascade run graph.json
  cascade run graph.json --set 6.positive="a red star" --set CascadePriorSampler.seed=7 --output pictures
  cascade run graph.json --set seed=random
  cascade run picture.png
  cascade run graph.json --server http://127.0.0.1:8188
  cascade batch graph.json prompts.csv --output pictures
  cascade show picture.png
  cascade nodes CascadePriorSampler
  cascade models
  cascade fetch text_to_image_lite_bf16
  cascade verify models
  cascade convert-lora official.safetensors kohya.safetensors --to kohya
  cascade merge stage_c.safetensors merged.safetensors --lora my_style.safetensors 0.8
  cascade train lora my_style.yaml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl-C, 143 for SIGTERM."""
    # So that every file name and help text can be written; standard error escapes by itself.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    # Before torch starts its threads: on a shared machine, threads that spin while they wait are many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with stopping_on_signals():
        return _run_command(options)


def _run_command(options: argparse.Namespace) -> int:
    try:
        return options.command(options)
    except CascadeError as error:
        if options.traceback:
            traceback.print_exception(error)
        for line in str(error).splitlines():
            _complain(f"error: {line}")
        return 1
    except KeyboardInterrupt as interrupt:
        _complain("Stopped.")
        return interrupt.status if isinstance(interrupt, Stopped) else INTERRUPTED
    except BrokenPipeError:  # the reader of our output has closed it
        _close_output()
        return 1
    except OSError as error:
        message = f"{error.filename} cannot be used" if error.filename else "the output cannot be written to"
        _complain(f"error: {message} ({error.strerror or error}).")
        _close_output()
        return 1
    except Exception as error:  # a bug: still reported in one line
        if options.traceback:
            traceback.print_exception(error)
        _complain(f"error: {on_one_line(error)} (--traceback shows where; please report this).")
        return 1


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="cascade",
        description="Stable Cascade graphs without ComfyUI, or on a ComfyUI that is running.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cascade-nodes {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    run = commands.add_parser("run", help="execute a graph")
    graph = "a graph in API format, a body of POST /prompt, a workflow, or a picture with one of them inside"
    run.add_argument("graph", type=Path, metavar="GRAPH", help=graph)
    run.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NODE.INPUT=VALUE",
        help="give an input another value; NODE is an id, or a class or title that only one node has; seed=VALUE is "
        "for all seeds, and random draws one",
    )
    output = "where pictures go, default: ./output"
    run.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help=output)
    source = (
        "where LoadImage looks, default: ./input, then beside the graph, in input beside its folder, and here"
    )
    run.add_argument("--input", type=Path, default=Path("input"), metavar="DIR", help=source)
    memory = "how much of the GPU's memory to take, such as 6GB, default: $CASCADE_MEMORY, else what is free"
    run.add_argument("--memory", metavar="SIZE", help=memory)
    run.add_argument("--server", metavar="URL", help="run on this ComfyUI instead of in this process")
    run.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    run.set_defaults(command=_run)
    add_batch_command(commands)
    show = commands.add_parser(
        "show", help="print what made a picture, or what a graph, a LoRA or a network is"
    )
    shown = "a picture, a graph as `cascade run` takes it, a LoRA, a network, or a folder of diffusers"
    show.add_argument("file", type=Path, metavar="FILE", help=shown)
    show.add_argument("--json", action="store_true", help="print JSON, with the graph itself")
    show.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    show.set_defaults(command=_show)
    nodes = commands.add_parser("nodes", help="list the nodes with their inputs and outputs")
    nodes.add_argument("ids", nargs="*", metavar="NODE", help="only these")
    nodes.add_argument("--json", action="store_true", help="as ComfyUI's /object_info")
    nodes.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    nodes.set_defaults(command=_nodes)
    _add_model_commands(commands)
    add_verify_command(commands)
    add_convert_command(commands)
    add_merge_command(commands)
    _add_train_command(commands)
    return parser


def _add_model_commands(commands: Any) -> None:
    models = commands.add_parser(
        "models", help="list the published files, where they are, and what each workflow lacks"
    )
    models.add_argument("--json", action="store_true", help="the same for programs")
    models.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    models.set_defaults(command=_models)
    fetch = commands.add_parser(
        "fetch",
        help="download published files",
        description="Downloads published files from the Hugging Face hub into their folders, and verifies them.",
    )
    names_help = "a file or a workflow as `cascade models` lists them; for a workflow, what it lacks"
    fetch.add_argument("names", nargs="+", metavar="NAME", help=names_help)
    root = "in place of ComfyUI's models folder, default: the first of $CASCADE_MODELS, ComfyUI's, ./models"
    fetch.add_argument("--to", type=Path, metavar="DIR", help=root)
    fetch.add_argument("--endpoint", metavar="URL", help="a mirror of the hub, default: $HF_ENDPOINT")
    fetch.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    fetch.set_defaults(command=_fetch)


def _add_train_command(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a LoRA, a ControlNet, a whole network, or tokens",
        description="Trains by a settings file; the same command goes on with a run that was stopped.",
    )
    train.add_argument("task", choices=("lora", "controlnet", "finetune", "tokens"))
    train.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="settings; paths in it are relative to it"
    )
    train.add_argument(
        "--fresh", action="store_true", help="begin anew instead of going on from a checkpoint"
    )
    train.add_argument(
        "--preset",
        metavar="SIZE",
        help="defaults for a card of 8gb, 12gb, 16gb, 24gb or 48gb; auto: of this card's memory",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the buckets, draw a page of the pictures, and train nothing",
    )
    train.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    train.set_defaults(command=_train)


def _close_output() -> None:
    """Redirects standard output to the null device, so that Python does not fail to flush it at exit."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _complain(text: str) -> None:
    with suppress(OSError):  # the terminal was closed
        for line in text.splitlines():
            print(escaped(line), file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> int:
    from .progress import ConsoleProgress
    from .saving import check_folder
    from .sentences import sentences

    check_folder(options.output)
    progress = ConsoleProgress()
    try:
        result = _execute(options, progress)
    finally:
        progress.close()
    for line in sentences(None, result.node_errors):
        _complain(f"error: {line}")
    return 1 if result.node_errors else 0


def _execute(options: argparse.Namespace, progress: ConsoleProgress) -> Result:
    if options.server is not None:
        from .client import Server, run_on_server
        from .folders import Folders
        from .sources import prepared, read_source

        server = Server(options.server)
        source = read_source(options.graph, server.inputs_of)
        ready = prepared(source, options.assignments, server.inputs_of, progress)
        folders = Folders(options.input, options.output)
        return run_on_server(server, ready.graph, folders, progress, ready.extra_pnginfo)
    from .execution import Executor
    from .run import run_graph

    if options.memory is not None:
        from ..cascade_core.placement import parse_bytes

        parse_bytes(options.memory)  # before the graph is read, since the error is the command line's
    return run_graph(
        options.graph,
        assignments=options.assignments,
        input_folder=options.input,
        output_folder=options.output,
        executor=Executor(progress, keep=False),
        partial=True,
        memory=options.memory,
    )


def _show(options: argparse.Namespace) -> int:
    from .show import show

    print(show(options.file, options.json))
    return 0


def _nodes(options: argparse.Namespace) -> int:
    from .listing import list_nodes

    print(list_nodes(options.ids, options.json))
    return 0


def _models(options: argparse.Namespace) -> int:
    from .models import list_models

    print(list_models(options.json))
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from .catalogue import check_name, notice

    for name in options.names:
        check_name(name)
    from ..nodes.hosts.headless.folders import roots
    from .fetch import fetch
    from .models import missing_files, new_files_root
    from .progress import TransferProgress

    root = options.to or new_files_root()
    names = missing_files(options.names, root)
    if not names:
        _complain("Nothing is missing; `cascade models` lists what is found where.")
        return 0
    for line in notice(names).splitlines():
        _complain(line)
    progress = TransferProgress()
    try:
        fetch(names, root, options.endpoint, progress)
    except KeyboardInterrupt:
        progress.close()
        _complain("What has arrived is kept; the same command goes on from there.")
        raise
    finally:
        progress.close()
    if root.resolve() not in [searched.resolve() for searched in roots()]:
        _complain(f"The loaders look there with CASCADE_MODELS={root}.")
    return 0


def _train(options: argparse.Namespace) -> int:
    from .train import run_training

    return run_training(options.task, options.config, options.fresh, options.dry_run, options.preset)
