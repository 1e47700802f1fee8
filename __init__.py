"""Entry point for ComfyUI, and the front door: `from cascade_nodes import StableCascade`.

Outside ComfyUI this same folder is the package `cascade_nodes`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cascade_core.arguments import StageSettings as StageSettings
    from .cascade_core.errors import CascadeError as CascadeError
    from .cascade_core.errors import Interrupted as Interrupted
    from .cascade_core.making import StageProgress as StageProgress
    from .cascade_core.stages.hint import Control as Control
    from .demo.door import StableCascade as StableCascade

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes. Imported here, not above: the module must also import where it has no parent
    package.
    """
    from .nodes.extension import CascadeExtension
    from .nodes.hosts import host
    from .nodes.hosts.example_pictures import place_pictures

    if folder := host().input_folder():
        place_pictures(folder)
    return CascadeExtension()


_HOME = {
    "CascadeError": "cascade_core.errors",
    "Control": "cascade_core.stages.hint",
    "Interrupted": "cascade_core.errors",
    "StageProgress": "cascade_core.making",
    "StableCascade": "demo.door",
    "StageSettings": "cascade_core.arguments",
}


def __getattr__(name: str) -> Any:
    """The front door and `__version__`, each found when it is asked for, so that the import stays light."""
    if name == "__version__":
        return _read_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def _read_version() -> str:
    """The version in pyproject.toml: of the file itself in a clone, which need not be installed, else of the
    installed distribution.
    """
    import tomllib
    from importlib.metadata import version
    from pathlib import Path

    try:
        text = Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return version("cascade-nodes")
    return tomllib.loads(text)["project"]["version"]
