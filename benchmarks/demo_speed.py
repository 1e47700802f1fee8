"""Compares two demos' time per picture on the CPU: `python -m cascade_nodes.benchmarks.demo_speed OTHER`.

Both make the same 256 × 256 picture after loading, in turns, at the shipped graph's steps and guidance. Prints the
medians and their ratio. --random gives Stage B random weights of the recipe's configuration, to compare designs before
training.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.networks.stage_b import StageB
from cascade_nodes.demo import recipe
from cascade_nodes.demo.door import DECODER, PRIOR, SIZE, WEIGHTS, StableCascade

PROMPT = "a large red star to the left of a small blue ring on a sand background"


def with_random_stage_b(folder: Path) -> None:
    """Copies the demo's weights to an empty folder, with a random Stage B of the recipe's configuration."""
    shutil.copytree(WEIGHTS, folder, dirs_exist_ok=True)
    network = StageB.from_config(recipe.STAGE_B)
    tensors = {name: value.half() for name, value in network.state_dict().items()}
    metadata = {"kind": "stage_b", "config": json.dumps(recipe.STAGE_B)}
    write_safetensors(folder / "demo_stage_b.safetensors", tensors, metadata)


def load(folder: Path) -> StableCascade:
    return StableCascade.load(folder, prior=PRIOR, decoder=DECODER, size=SIZE, device="cpu")


def seconds(cascade: StableCascade) -> float:
    """Seconds of one picture."""
    started = time.perf_counter()
    cascade(PROMPT, seed=1)
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, nargs="?", help="a folder of weights")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the folder to compare with")
    parser.add_argument(
        "--random", action="store_true", help="instead of a folder: the recipe's Stage B with random weights"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        if options.random:
            with_random_stage_b(Path(temporary))
        elif options.other is None:
            parser.error("a folder of weights is expected, or --random")
        cascades = [load(options.weights), load(Path(temporary) if options.random else options.other)]
        times: list[list[float]] = [[], []]
        for turn in range(options.rounds + 1):
            for cascade, own in zip(cascades, times, strict=True):
                elapsed = seconds(cascade)
                if turn:  # the first warms up
                    own.append(elapsed)
    first, other = (median(own) for own in times)
    print(f"{first:.2f} s and {other:.2f} s on {torch.get_num_threads()} threads: {other / first:.2f}")


if __name__ == "__main__":
    main()
