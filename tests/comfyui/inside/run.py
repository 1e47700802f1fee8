"""Runs scripts of this folder inside ComfyUI: `python run.py parity,interop`, in a checkout, with its Python.

ComfyUI is set to the CPU before it chooses a device; or it is set up by its own `main.py`, with the flags that follow
the scripts' names. This pack is imported as `cascade_nodes`; random numbers are seeded for each script. Prints on its
last line, as JSON, for each script what its `measure` returns and the error that it ended with, or null.
"""

import gc
import importlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def import_pack() -> None:
    """Imports the pack as ComfyUI does: the folder's `__init__.py` under a name."""
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


def attempt(name: str) -> tuple[dict[str, Any], str | None]:
    """What one script measures, and its error; nothing of it stays loaded."""
    import comfy.model_management
    import torch

    torch.manual_seed(0)
    sys.path.insert(0, str(HERE))  # before what ComfyUI adds, which has a lora.py too
    try:
        with torch.inference_mode():
            return importlib.import_module(name).measure(), None
    except Exception:
        return {}, traceback.format_exc()
    finally:
        sys.path.remove(str(HERE))
        comfy.model_management.unload_all_models()
        gc.collect()


def main(names: str, *flags: str) -> None:
    set_up(list(flags))
    import_pack()
    print(json.dumps({name: attempt(name) for name in names.split(",")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
