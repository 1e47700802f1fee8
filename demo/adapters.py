"""Trains the demo's adapters on its networks: `python -m cascade_nodes.demo.adapters --gpus 0,1 --seconds 400`.

Each ControlNet, LoRA and token is trained by its own process (`train_adapter.py`), with its own log in the folder of
checkpoints. Several share a GPU, so that one makes data while another computes; each GPU has lanes of adapters that
follow one another. Finished adapters are skipped, and interrupted ones are resumed.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cascade_nodes.demo.everything import Training, train_together
from cascade_nodes.demo.job import FINISHED
from cascade_nodes.demo.train import WEIGHTS

# For each lane, the share of the time at which each adapter's training ends. The first two lanes run on the first
# GPU, the others on the last. A GPU divides its time equally among ready processes, so an adapter gets half of a GPU.
LANES: Sequence[Mapping[str, float]] = (
    {"canny": 1.0},
    {"house": 0.55, "super_resolution": 0.85, "loop": 1.0},
    {"inpainting": 1.0},
    {"few_steps": 1.0},
)


def trainings(options: argparse.Namespace, gpus: Sequence[str]) -> list[list[Training]]:
    """A process for each unfinished adapter, in lanes."""
    began, lanes = time.time(), []
    threads = max((os.cpu_count() or 1) // len(LANES), 1)
    for number, shares in enumerate(LANES):
        gpu = gpus[0 if number < len(LANES) // 2 else -1]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": gpu,
            "OMP_NUM_THREADS": f"{threads}",
        }
        lane = []
        for name, share in shares.items():
            if name not in options.only or (options.work / name / FINISHED).exists():
                continue
            until = began + share * options.seconds
            arguments = ["--work", str(options.work), "--weights", str(options.weights)]
            arguments += ["--out", str(options.out or options.weights), "--until", f"{until:.0f}"]
            arguments += options.options
            log = options.work / f"{name}.log"
            lane.append(Training(name, arguments, environment, log, began, "train_adapter"))
        lanes.append(lane)
    return lanes


def main(arguments: Sequence[str] | None = None) -> None:
    names = [name for lane in LANES for name in lane]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs, by commas (default: 0)")
    parser.add_argument("--seconds", type=float, default=800, help="seconds for all of them (default: 800)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="checkpoints and logs (default: runs)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the base, and where the adapters go")
    parser.add_argument("--out", type=Path, help="where the adapters go instead")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument(
        "options", nargs="*", help="after --: options of each training, such as --scenes 20000"
    )
    options = parser.parse_args(arguments)
    started = time.time()
    for folder in (options.work, options.out or options.weights):
        folder.mkdir(parents=True, exist_ok=True)
    train_together(trainings(options, options.gpus.split(",")))
    print(f"trained in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
