"""Process without ComfyUI for benchmarks/served.py: runs graphs as `cascade run` does, and keeps their nodes' outputs.

Reads commands as lines of JSON, [command, value], and answers each with a line.
"""

import json
import platform
import sys
from typing import Any

import torch

from cascade_nodes.headless import Executor, run_graph
from cascade_nodes.headless.registry import available_nodes
from cascade_nodes.headless.results import Observer
from cascade_nodes.nodes.api import io
from inside_server import Measuring


class ImageCrop(io.ComfyNode):
    """The part of ComfyUI's node that the benchmark's graphs use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sides = [io.Int.Input(name, min=0) for name in ("width", "height", "x", "y")]
        return io.Schema(
            node_id="ImageCrop",
            display_name="Crop",
            category="benchmark",
            inputs=[io.Image.Input("image"), *sides],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, width: int, height: int, x: int, y: int) -> io.NodeOutput:
        return io.NodeOutput(image[:, y : y + height, x : x + width].cpu())


class Entered(Observer):
    """Observer that reports each node to the measurement."""

    def __init__(self, measuring: Measuring):
        self.measuring = measuring

    def node_started(self, index: int, total: int, name: str) -> None:
        self.measuring.enter(name)


def describe() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": f"cuda:0 {torch.cuda.get_device_name()}" if cuda else "cpu",
        "allocator": torch.cuda.get_allocator_backend() if cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(output: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    measuring = Measuring()
    executor = Executor(Entered(measuring))
    nodes = {**available_nodes(), "ImageCrop": ImageCrop}
    for line in sys.stdin:
        what, value = json.loads(line)
        try:
            if what == "run":
                result = run_graph(value, output_folder=output, nodes=nodes, executor=executor)
                measuring.enter(None)
                answer = {"seconds": result.seconds, "picture": str(result.pictures[-1].path)}
            elif what == "describe":
                answer = describe()
            else:
                answer = {"start": measuring.start, "finish": measuring.finish}[what](value)
        except Exception as error:
            answer = {"failure": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
