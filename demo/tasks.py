"""Measures the demo's tasks besides text to image: `python -m cascade_nodes.demo.tasks [TASK …]`.

All figures are measured on scenes that were never trained on; the judge reads the pictures.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from cascade_nodes.cascade_core.writing import output_file, write_file
from cascade_nodes.demo.control_tasks import CONTROL_TASKS
from cascade_nodes.demo.evaluate import machine_name, write_sheet
from cascade_nodes.demo.measuring import Figures
from cascade_nodes.demo.picture_tasks import PICTURE_TASKS
from cascade_nodes.demo.pipeline import WEIGHTS, DemoCascade
from cascade_nodes.demo.taught_tasks import TAUGHT_TASKS

TASKS: dict[str, Callable[[DemoCascade, int], tuple[Figures, Tensor]]] = {
    task.__name__: task for task in (*PICTURE_TASKS, *CONTROL_TASKS, *TAUGHT_TASKS)
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=200, help="pictures for each figure (default: 200)")
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet of each task into this folder")
    options = parser.parse_args(arguments)
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        parser.error(f"no task is called {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    cascade = DemoCascade.load(options.weights, options.device)
    figures: dict[str, Figures] = {}
    for name in options.tasks or TASKS:
        started = time.monotonic()
        figures[name], images = TASKS[name](cascade, options.count)
        for key, value in figures[name].items():
            print(f"{name:20} {key:36} {value:.4f}", flush=True)
        print(f"{name:20} {time.monotonic() - started:.0f} s", flush=True)
        if options.sheets:
            write_sheet(images, options.sheets / f"{name}.jpg")
    if options.json:
        about = {
            "count": options.count,
            "machine": machine_name(options.device),
            "date": date.today().isoformat(),
        }
        write_file(options.json, json.dumps(about | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
