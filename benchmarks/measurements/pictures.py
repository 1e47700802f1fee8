"""Whole pictures after a first one, by every program: random text embeddings in, pixels in main memory out."""

import math
import statistics
from typing import Any

from context import Context
from machine import print_table
from picture import BenchmarkPicture
from programs.ours import ENGINE, FP8
from timing import clean, seconds

FOUR = 4


def measure(context: Context) -> dict[str, Any]:
    setup = context.setup
    single, four = BenchmarkPicture(setup), BenchmarkPicture(setup, batch=FOUR)
    engine_runs, other_runs = max(setup.runs // 2, 1), max(setup.runs // 5, 1)
    results: dict[str, Any] = {
        "limit": context.limit_ms(context.arithmetic.picture(setup.side, 1)) / 1000,
        "limit_of_4": context.limit_ms(context.arithmetic.picture(setup.side, FOUR)) / 1000,
        "programs": {},
        "of_4": {},
    }
    for program in context.programs():
        fast = program.name in (ENGINE, FP8)
        with context.isolated(f"picture, {program.name}"):
            results["programs"][program.name] = _of_loop(single, program, engine_runs if fast else other_runs)
            if fast:
                results["of_4"][program.name] = _of_loop(four, program, other_runs)
    for sampling in context.samplings():
        clean(setup.device)
        try:
            sampling.run(1)
            times = [seconds(lambda s=sampling: s.run(1), setup.device) for _ in range(other_runs)]
            results["programs"][sampling.name] = {"whole": statistics.median(times)}
        except Exception as error:  # of another program: ours are measured all the same
            context.missing[sampling.name] = f"{type(error).__name__}: {error}"
    return results


def _of_loop(picture: BenchmarkPicture, program: Any, runs: int) -> dict[str, float]:
    clean(picture.setup.device)
    for _ in range(2):  # the second records the graph of Stage A
        picture.make(program)
    times = [picture.time(program) for _ in range(runs)]
    return {part: statistics.median(time[part] for time in times) for part in times[0]}


def report(results: dict[str, Any]) -> None:
    best = results["programs"].get(ENGINE, {}).get("whole", math.nan)
    rows = [
        [name, f"{times['whole']:.3f}", f"{times['whole'] / best:.2f}", *_stages(times)]
        for name, times in results["programs"].items()
    ]
    print_table(["one picture", "seconds", "× engine", "Stage C", "Stage B", "Stage A"], rows)
    print(f"limit {results['limit']:.3f} s at the measured ceiling\n")
    rows = [[name, f"{times['whole']:.3f}", *_stages(times)] for name, times in results["of_4"].items()]
    print_table(["four pictures", "seconds", "Stage C", "Stage B", "Stage A"], rows)
    print(f"limit {results['limit_of_4']:.3f} s at the measured ceiling")


def _stages(times: dict[str, float]) -> list[str]:
    return [f"{times[kind]:.3f}" if kind in times else "" for kind in ("stage_c", "stage_b", "stage_a")]
