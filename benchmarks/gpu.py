"""Speed of pictures on a graphics card, against the card's limit, and beside other programs.

Full size with random weights, 1024 × 1024, 20 + 10 steps, guidance in both stages, bf16. Other programs run in the same
process on the same weights, after ours: ComfyUI from a checkout, diffusers where it can be imported.

    python benchmarks/gpu.py [--only forward,profile] [--profile] [--programs ours,comfyui,diffusers] [--json FILE]
    python benchmarks/gpu.py --toy          every line, with tiny networks, on the processor

ceilings  what the device reaches in a large product and a copy
forward   one forward of each stage
profile   the engine's kernels by time (only where asked for)
picture   whole pictures
error     the distance to float32
first     the first picture of a process
sizes     cost by size and batch

Each measurement is printed and written as soon as it is done; those not run again are kept in the file.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import measurements.ceilings
import measurements.error
import measurements.first
import measurements.forward
import measurements.pictures
import measurements.profile
import measurements.sizes
import targets
from cascade_nodes.cascade_core.writing import output_file, write_file
from context import PROGRAMS, Context
from machine import describe_machine
from measurements.first import FLAG, in_this_process
from networks import full, tiny

MEASUREMENTS: dict[str, ModuleType] = {
    "ceilings": measurements.ceilings,
    "forward": measurements.forward,
    "profile": measurements.profile,
    "picture": measurements.pictures,
    "error": measurements.error,
    "first": measurements.first,
    "sizes": measurements.sizes,
}
ON_DEMAND = "profile"


def run(context: Context, names: list[str], results: dict[str, Any], path: Path | None) -> list[str]:
    """Measures, prints and stores one measurement after the other.

    Returns the errors, of whole measurements and of programs in them (`context.isolated`); none stops the next one.
    """
    errors = context.errors
    for name in names:
        start = time.perf_counter()
        try:
            results[name] = MEASUREMENTS[name].measure(context)
        except Exception as error:
            traceback.print_exc()
            errors.append(f"{name}: {type(error).__name__}: {error}")
            continue
        print(f"\n## {name}, {time.perf_counter() - start:.0f} s\n", flush=True)
        MEASUREMENTS[name].report(results[name])
        sys.stdout.flush()
        results["missing"] = dict(context.missing)
        save(results, path)
    return errors


def save(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_file(path, json.dumps(results, indent=1) + "\n")


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return "the processor"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def chosen(value: str, choices: tuple[str, ...]) -> list[str]:
    names = [name for name in value.split(",") if name]
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(choices)}")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=lambda value: chosen(value, tuple(MEASUREMENTS)), help="measurements, by commas"
    )
    parser.add_argument("--profile", action="store_true", help="also the engine's kernels")
    parser.add_argument(
        "--programs", type=lambda value: chosen(value, PROGRAMS), default=list(PROGRAMS), help="by commas"
    )
    parser.add_argument("--comfyui", type=Path, help="a checkout of ComfyUI; default: COMFYUI_PATH's last")
    parser.add_argument("--toy", action="store_true", help="tiny networks on the processor")
    parser.add_argument("--json", type=output_file, help="keep the figures here")
    parser.add_argument(FLAG, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.inference_mode()
def main() -> int:
    options = parse()
    if not (options.toy or torch.cuda.is_available()):
        raise SystemExit("There is no CUDA device here; --toy runs tiny networks on the processor.")
    setup = tiny(torch.device("cpu")) if options.toy else full(torch.device("cuda"))
    context = Context(setup, options.toy, tuple(options.programs), options.comfyui)
    if options.first_picture:
        print(json.dumps(in_this_process(context)))
        return 0
    default = [name for name in MEASUREMENTS if name != ON_DEMAND]
    names = [name for name in MEASUREMENTS if name in (options.only or default)]
    if options.profile and ON_DEMAND not in names:
        names = [name for name in MEASUREMENTS if name in (*names, ON_DEMAND)]
    results: dict[str, Any] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    results |= {"machine": describe_machine(), "device": describe_device(setup.device)}
    print(f"{results['machine']}\n{results['device']}")
    errors = run(context, names, results, options.json)
    print("\n## targets\n")
    targets.report(results)
    for subject, reason in {**context.missing, **dict(enumerate(errors))}.items():
        print(f"{subject}: {reason}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
