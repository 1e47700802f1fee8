"""Runs a script of this folder inside ComfyUI: `python run.py parity`, in a checkout, with its Python.

ComfyUI is set to the CPU before it chooses a device; or it is set up by its own `main.py`, with the flags that follow
the script's name. This pack is imported as `cascade_nodes`, random numbers are seeded. Prints what the script's
`measure` returns as JSON, on its last line.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def import_pack() -> None:
    """As ComfyUI does it: the folder's `__init__.py` under a name."""
    location = importlib.util.spec_from_file_location(
        "cascade_nodes", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules["cascade_nodes"] = module
    location.loader.exec_module(module)


def set_up(flags: list[str]) -> None:
    """ComfyUI as it is before its first prompt; by its presence the pack knows its host."""
    if flags:
        sys.argv[1:] = flags
        importlib.import_module("main")
    else:
        importlib.import_module("comfy.cli_args").args.cpu = True
        importlib.import_module("comfy.model_management")


def main(name: str, *flags: str) -> None:
    set_up(list(flags))
    import_pack()
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        print(json.dumps(importlib.import_module(name).measure()))


if __name__ == "__main__":
    main(*sys.argv[1:])
