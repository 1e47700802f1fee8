"""Embedded graph host: runs ComfyUI's API-format graphs of our nodes without ComfyUI.

    from cascade_nodes.headless import run_graph
    result = run_graph("graph.json", assignments=["6.positive=a red star"], output_folder="pictures")

Importing this package loads neither torch nor the nodes; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .execution import Executor
    from .results import Result
    from .run import run_graph

__all__ = ["Executor", "Result", "run_graph"]


def __getattr__(name: str) -> Any:
    if name == "run_graph":
        from .run import run_graph

        return run_graph
    if name == "Executor":
        from .execution import Executor

        return Executor
    if name == "Result":
        from .results import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
