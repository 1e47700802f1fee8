"""Time of a picture by the amount of a graphics card's memory that this project may use.

The whole cascade with random weights (Stage C 3.6 B, Stage B 1.5 B, Stage A, CLIP's bigG), 1024 × 1024, 20 and 10 steps
with guidance in both, text encoding and decoding included, by the nodes as `cascade run` calls them. Each limit has
its own process, in which `set_per_process_memory_fraction` enforces it. Pictures are timed from the third on, when
all resident weights are on the card and streamed ones are pinned in main memory. Then the memory of Stage A's
decoding beside its weights, and the time from an uncached file of Stage C to its first step, with the main memory
used.

    python benchmarks/memory.py [--limits 16 12 8 6 4] [--runs 2] [--dtype int8] [--folder FOLDER] [--files FILES]
                                [--no-loading] [--json FILE] [--toy]

--dtype: of Stage C and B under a limit; without a limit they keep the file's, to which the ratios refer.
--files: the four files stay there, for the next run or for precisions.py.
--toy runs all of it on a processor with tiny networks, main memory in the card's place.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.placement import DeviceMemory, SimulatedDevice
from cascade_nodes.cascade_core.text.clip import TextConfig
from cascade_nodes.cascade_core.writing import output_file, write_file
from cascade_nodes.nodes.hosts.headless.device import compute_device
from limited_memory import measure_loading, measure_pictures
from load import drop_from_cache, read_sequentially
from machine import describe_machine, print_table
from networks import full, tiny
from random_files import write_network
from timing import GB

LIMITS = (16.0, 12.0, 8.0, 6.0, 4.0)  # GB
PROMISED = {16.0: 1.1, 12.0: 1.2, 8.0: 1.6, 6.0: 2.5}  # times the seconds without a limit
DECODED = {1024: 1.0, 4096: 3.0}  # pixels a side: GB beside the weights
HOST_SHARE = 1.1  # of the file, in main memory while it is loaded
BIG_G = asdict(TextConfig())
TOY_TEXT = {
    **BIG_G,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "projection_dim": 64,
}


def write_all(folder: Path, toy: bool) -> dict[str, int]:
    """Writes the four networks' files, `kind.safetensors`, unless they exist. Returns {kind: bytes}."""
    configs = dict((tiny if toy else full)(torch.device("cpu")).configs)
    if toy:
        configs["stage_c"] = {**configs["stage_c"], "c_clip_text": 64, "c_clip_text_pooled": 64}
        configs["stage_b"] = {**configs["stage_b"], "c_clip": 64}
    files = {kind: (config, torch.bfloat16) for kind, config in configs.items()}
    files["text"] = (TOY_TEXT if toy else BIG_G, torch.float16)
    sizes = {}
    for kind, (config, dtype) in files.items():
        path = folder / f"{kind}.safetensors"
        sizes[kind] = path.stat().st_size if path.exists() else write_network(path, kind, config, dtype)
    return sizes


def run_child(options: argparse.Namespace) -> None:
    device = torch.device("cpu" if options.toy else "cuda")
    if options.toy:
        simulated = SimulatedDevice(int((options.limit or 1000) * GB * options.scale))
        compute_device().pool = DeviceMemory(simulated, unit_bytes=50_000)
    elif options.limit is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit * GB / total)
    if options.child == "loading":
        measured = measure_loading(options.folder, device)
    else:
        size = (64, (2, 2)) if options.toy else (1024, (20, 10))
        sides = [side // (64 if options.toy else 1) for side in DECODED] if options.limit is None else []
        measured = measure_pictures(options.folder, device, size, options.runs, sides, options.dtype)
    print(json.dumps({"gb": options.limit, **measured}))


def start_child(
    options: argparse.Namespace, folder: Path, child: str, scale: float, limit: float | None
) -> Any:
    """Results of a separate process; {"error": …} where it failed."""
    command = [
        sys.executable,
        __file__,
        "--child",
        child,
        "--folder",
        str(folder),
        "--runs",
        str(options.runs),
    ]
    command += ["--scale", str(scale)] + (["--toy"] if options.toy else [])
    command += [] if limit is None else ["--limit", str(limit), "--dtype", options.dtype]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        measured = {"gb": limit, "error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    else:
        measured = json.loads(done.stdout.splitlines()[-1])
    print(child, measured, flush=True)  # printed before the next process, which may fail
    return measured


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all measurements, on files that are removed afterwards unless --files is given."""
    folder = options.files or Path(tempfile.mkdtemp(prefix="cascade_memory_", dir=options.folder))
    folder.mkdir(parents=True, exist_ok=True)
    loading: dict[str, Any] = {"error": "it was left out"}
    disk = math.nan
    try:
        sizes = write_all(folder, options.toy)
        scale = sum(sizes.values()) / 11.8e9  # 1, or for the toy less: its card is smaller too
        limits = [start_child(options, folder, "pictures", scale, limit) for limit in (None, *options.limits)]
        if not options.no_loading:
            path = folder / "stage_c.safetensors"
            drop_from_cache(path)
            disk = read_sequentially(path)
            drop_from_cache(path)
            loading = start_child(options, folder, "loading", scale, None)
    finally:
        if not options.files:
            shutil.rmtree(folder, ignore_errors=True)
    card = "" if options.toy else f", {torch.cuda.get_device_name()}"
    return {
        "machine": describe_machine() + card,
        "sizes": sizes,
        "dtype": options.dtype,
        "resident": limits[0].get("seconds", math.nan),
        "unlimited": limits[0],
        "limits": limits[1:],
        "disk": disk,
        "loading": loading,
    }


def report(results: dict[str, Any]) -> None:
    size = sum(results["sizes"].values())
    print(f"{results['machine']}\nall weights: {size / GB:.2f} GB\n")
    head = [
        "memory",
        "picture s",
        "ratio",
        "promised",
        "first s",
        "peak GB",
        "reserved GB",
        "Stage C there",
        "B",
        "text",
    ]
    print_table(
        head, [_row(limit, results["resident"]) for limit in (results["unlimited"], *results["limits"])]
    )
    for limit in (results["unlimited"], *results["limits"]):
        for text in (*limit.get("told", ()), *limit.get("warnings", ())):
            print(f"{limit['gb'] or 'no limit'}: {text}")
        for kind, runs in limit.get("runs", {}).items():
            print(f"{limit['gb'] or 'no limit'}: {kind}, the last picture: {runs[-1]}")
    print()
    decoded = results["unlimited"].get("decode", ())
    rows = [
        [f"{of['side']}²", f"{1000 * of['seconds']:.0f}", f"{of['peak_gb']:.2f}", f"≤ {promised:g}"]
        for of, promised in zip(decoded, DECODED.values(), strict=False)
    ]
    print_table(["Stage A decodes", "ms", "GB beside the weights", "promised"], rows)
    loading, file = results["loading"], results["sizes"]["stage_c"]
    if "error" in loading:
        print(f"\nloading failed: {loading['error']}")
        return
    print(
        f"\nStage C's file ({file / GB:.2f} GB) cold: first step after {loading['first_step']:.1f} s, where reading it "
        f"alone takes {results['disk']:.1f} s; main memory {loading['host'] / file:.2f} of the file (≤ {HOST_SHARE})"
    )


def _row(limit: dict[str, Any], resident: float) -> list[str]:
    name = "no limit" if limit.get("gb") is None else f"{limit['gb']:g} GB"
    promised = PROMISED.get(limit.get("gb") or 0)
    bound = f"≤ {promised:g}" if promised else ("finishes" if limit.get("gb") else "")
    if "error" in limit:
        return [name, limit["error"][:60], "", bound, *[""] * 6]
    resident_shares = limit["staying"]
    shares = [
        f"{resident_shares[kind]:.0%}" if kind in resident_shares else ""
        for kind in ("stage_c", "stage_b", "text")
    ]
    figures = [
        f"{limit['seconds']:.2f}",
        f"{limit['seconds'] / resident:.2f}",
        bound,
        f"{limit['first']:.1f}",
    ]
    return [name, *figures, f"{limit['peak_gb']:.2f}", f"{limit['reserved_gb']:.2f}", *shares]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limits", type=float, nargs="*", default=LIMITS, help="GB of the card")
    parser.add_argument("--runs", type=int, default=2, help="pictures that are timed, after two untimed ones")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where 12 GB of files go"
    )
    parser.add_argument("--dtype", default="auto", help="dtype of Stage C and B where memory is limited")
    parser.add_argument("--files", type=Path, help="keep the files here")
    parser.add_argument("--no-loading", action="store_true", help="pictures alone")
    parser.add_argument("--json", type=output_file, help="also write the numbers to this file")
    parser.add_argument("--toy", action="store_true", help="tiny networks on a processor: do all lines run?")
    parser.add_argument("--child", choices=["pictures", "loading"], help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    results = run(options)
    report(results)
    if options.json:
        write_file(options.json, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
