"""Plots for docs/performance.md from the results of benchmarks/gpu.py and benchmarks/memory.py.

    python benchmarks/plots.py --gpu gpu.json [--memory memory.json] --folder docs/pictures

speed.png   seconds of a picture by program, and the limit of the card
sizes.png   seconds of a picture and its memory by size
memory.png  seconds of a picture by the memory that it is held to
"""

import argparse
import json
from pathlib import Path
from typing import Any

from charts import Points, bars, curves
from networks import CLASSES
from programs.ours import EAGER, ENGINE, FP8

Results = dict[str, Any]
OURS = {EAGER: "this project, eager", ENGINE: "this project", FP8: "this project, fp8"}


def draw_speed(gpu: Results, path: Path) -> None:
    picture = gpu["picture"]
    programs: dict[str, Any] = picture["programs"]
    seconds = {OURS.get(name, name): times["whole"] for name, times in programs.items()}
    fastest_first = dict(sorted(seconds.items(), key=lambda item: item[1]))
    bars("One picture, after the first", fastest_first, "s", path, list(OURS.values()), picture["limit"])


def draw_sizes(gpu: Results, path: Path) -> None:
    points = [point for point in gpu["sizes"]["points"] if "error" not in point]
    single = [point for point in points if point["batch"] == 1]
    panels = {
        "seconds of a picture": {
            "this project": [(point["side"], point["seconds"]) for point in single],
            "limit of the card": [(point["side"], point["limit"]) for point in single],
        },
        "GB beside the weights": {
            "this project": [
                (point["side"], max(point[kind]["peak_gb"] for kind in CLASSES)) for point in single
            ]
        },
    }
    measured_panels = {
        label: series for label, series in panels.items() if any(y > 0 for _, y in series["this project"])
    }
    curves("By size", measured_panels, "pixels a side", path)


def draw_memory(memory: Results, path: Path) -> None:
    """`limits`: for each limit `gb`, and `seconds` of a picture; `resident`: the seconds without one."""
    limits = sorted(memory["limits"], key=lambda limit: limit["gb"])
    seconds: Points = [(limit["gb"], limit["seconds"]) for limit in limits if limit.get("seconds")]
    whole: Points = [(gb, memory["resident"]) for gb, _ in seconds]
    panel = {"held to this memory": seconds, "all resident": whole}
    curves("By the card's memory", {"seconds of a picture": panel}, "GB", path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=Path, help="what benchmarks/gpu.py has kept")
    parser.add_argument("--memory", type=Path, help="what benchmarks/memory.py has kept")
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    plots = [
        (options.gpu, "picture", draw_speed, "speed.png"),
        (options.gpu, "sizes", draw_sizes, "sizes.png"),
        (options.memory, "limits", draw_memory, "memory.png"),
    ]
    for source, key, draw, name in plots:
        results = {} if source is None else json.loads(source.read_text(encoding="utf-8"))
        if key in results:
            draw(results, options.folder / name)
            print(options.folder / name)


if __name__ == "__main__":
    main()
