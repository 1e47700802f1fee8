"""Whole pictures after a first one, by every program: random text embeddings in, pixels in main memory out."""

import math
import statistics
from typing import Any

from bench import Bench
from loop import Picture
from machine import print_table
from programs.ours import ENGINE, FP8
from timing import clean, seconds

FOUR = 4


def measure(bench: Bench) -> dict[str, Any]:
    setup = bench.setup
    single, four = Picture(setup), Picture(setup, batch=FOUR)
    many, few = max(setup.runs // 2, 1), max(setup.runs // 5, 1)
    found: dict[str, Any] = {
        "limit": bench.limit_ms(bench.arithmetic.picture(setup.side, 1)) / 1000,
        "limit_of_4": bench.limit_ms(bench.arithmetic.picture(setup.side, FOUR)) / 1000,
        "programs": {},
        "of_4": {},
    }
    for program in bench.programs():
        fast = program.name in (ENGINE, FP8)
        with bench.apart(f"picture, {program.name}"):
            found["programs"][program.name] = _of_loop(single, program, many if fast else few)
            if fast:
                found["of_4"][program.name] = _of_loop(four, program, few)
    for sampling in bench.samplings():
        clean(setup.device)
        try:
            sampling.run(1)
            times = [seconds(lambda s=sampling: s.run(1), setup.device) for _ in range(few)]
            found["programs"][sampling.name] = {"whole": statistics.median(times)}
        except Exception as error:  # of another program: ours are measured all the same
            bench.missing[sampling.name] = f"{type(error).__name__}: {error}"
    return found


def _of_loop(picture: Picture, program: Any, runs: int) -> dict[str, float]:
    clean(picture.setup.device)
    for _ in range(2):  # the second records the graph of Stage A
        picture.make(program)
    times = [picture.time(program) for _ in range(runs)]
    return {part: statistics.median(time[part] for time in times) for part in times[0]}


def report(found: dict[str, Any]) -> None:
    best = found["programs"].get(ENGINE, {}).get("whole", math.nan)
    rows = [
        [name, f"{of['whole']:.3f}", f"{of['whole'] / best:.2f}", *_parts(of)]
        for name, of in found["programs"].items()
    ]
    print_table(["one picture", "seconds", "× engine", "Stage C", "Stage B", "Stage A"], rows)
    print(f"limit {found['limit']:.3f} s at the measured ceiling\n")
    rows = [[name, f"{of['whole']:.3f}", *_parts(of)] for name, of in found["of_4"].items()]
    print_table(["four pictures", "seconds", "Stage C", "Stage B", "Stage A"], rows)
    print(f"limit {found['limit_of_4']:.3f} s at the measured ceiling")


def _parts(of: dict[str, float]) -> list[str]:
    return [f"{of[kind]:.3f}" if kind in of else "" for kind in ("stage_c", "stage_b", "stage_a")]
