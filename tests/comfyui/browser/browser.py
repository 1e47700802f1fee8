"""Chromium and playwright-core, both from outside the project, and the scenarios played in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLAYER = HERE / "interface.mjs"


def find_modules() -> str | None:
    """The folder for NODE_PATH that holds playwright-core: the one that NODE_PATH names, or ~/browser's."""
    stated = os.environ.get("NODE_PATH", "").split(os.pathsep)
    places = [Path(place) for place in stated if place] + [Path.home() / "browser" / "node_modules"]
    return next((str(place) for place in places if (place / "playwright-core").is_dir()), None)


def find_chromium() -> str | None:
    """The browser that CHROMIUM names, or the one on the path."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


def missing() -> str | None:
    """What these tests lack, in words; None if nothing is missing."""
    lacking = {
        "node": shutil.which("node"),
        "chromium (or CHROMIUM)": find_chromium(),
        "playwright-core in NODE_PATH or ~/browser/node_modules": find_modules(),
    }
    names = [name for name, present in lacking.items() if not present]
    return f"the interface is not tested for lack of {', '.join(names)}" if names else None


def environment() -> dict[str, str]:
    """The environment variables with which Node.js finds playwright-core."""
    return {**os.environ, "NODE_PATH": find_modules() or ""}


def play(url: str, *, nodes2: bool, **settings: Any) -> dict[str, Any]:
    """What each scenario saw in the interface at an address. RuntimeError where the page did not open."""
    job = {"url": url, "nodes2": nodes2, "chromium": find_chromium(), **settings}
    finished = subprocess.run(
        ["node", PLAYER],
        input=json.dumps(job),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"the browser failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout)
