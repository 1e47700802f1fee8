"""Entry point for ComfyUI. Outside ComfyUI this same folder is the package `cascade_nodes`."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes. Imported here, not above: the module must also import where it has no parent
    package.
    """
    from .nodes.extension import CascadeExtension

    return CascadeExtension()


def __getattr__(name: str) -> Any:
    """`__version__`, read where it is asked for, so that the import stays light."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _read_version()


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
