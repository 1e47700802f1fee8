"""Checkouts of ComfyUI to test against, and ComfyUI started from one of them.

`COMFYUI_PATH` names them (several, separated as in PATH); without it those in `comfyui/` under the home folder are
taken. Each has its own virtual environment in `.venv`; docs/testing.md says how to prepare one.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_nodes.tests.obstacles import respect_permissions

PACK = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside" / "run.py"
FOLDERS = ("input", "output", "temp", "user", "models", "custom_nodes")
START_SECONDS = 180
# One thread: the machine runs the tests as well, and threads that wait for each other are slower than one.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a script of `inside/` measured, or the error that it ended with."""

    found: dict[str, Any]
    error: str | None = None

    @property
    def numbers(self) -> dict[str, Any]:
        """The script's measurements; RuntimeError if it failed."""
        if self.error:
            raise RuntimeError(self.error)
        return self.found


@dataclass(frozen=True)
class Checkout:
    """A folder with ComfyUI in it."""

    path: Path

    @property
    def python(self) -> Path:
        """The Python that has what this ComfyUI needs."""
        return self.path / ".venv" / "bin" / "python"

    @property
    def version(self) -> str:
        """Its version, such as 0.3.64."""
        text = (self.path / "comfyui_version.py").read_text(encoding="utf-8")
        match = re.search(r'__version__ = "([^"]+)"', text)
        return match.group(1) if match else "unknown"

    def inside(self, *names: str, flags: Sequence[str] = (), timeout: float = 1200) -> dict[str, Outcome]:
        """Runs each `inside/<name>.py` in one process with ComfyUI's own modules; returns its outcome by name.

        flags: of ComfyUI's command line; without any it is set to the CPU.
        """
        finished = subprocess.run(
            [self.python, INSIDE, ",".join(names), *flags],
            cwd=self.path,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(self._search_path())},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if finished.returncode:
            error = f"{', '.join(names)} in {self.path} failed:\n{finished.stderr[-6000:]}"
            return dict.fromkeys(names, Outcome({}, error))
        return {
            name: Outcome(*outcome) for name, outcome in json.loads(finished.stdout.splitlines()[-1]).items()
        }

    def _search_path(self) -> list[str]:
        """Python's search path with ComfyUI's own modules first."""
        return [str(self.path), *filter(None, [os.environ.get("PYTHONPATH")])]


def find_checkouts() -> list[Checkout]:
    """Checkouts that can be started, oldest version first; RuntimeError if a named one cannot."""
    stated = os.environ.get("COMFYUI_PATH")
    if stated:
        folders = [Path(entry).expanduser() for entry in stated.split(os.pathsep) if entry]
        for folder in folders:
            if not (folder / "main.py").exists() or not Checkout(folder).python.exists():
                raise RuntimeError(f"COMFYUI_PATH names {folder}, which holds no main.py or no .venv.")
    else:
        home = Path.home() / "comfyui"
        folders = sorted(path.parent for path in home.glob("*/main.py"))
        folders = [folder for folder in folders if Checkout(folder).python.exists()]
    checkouts = [Checkout(folder) for folder in folders]
    return sorted(checkouts, key=lambda one: [int(part) for part in re.findall(r"\d+", one.version)])


CHECKOUTS = find_checkouts()


class Server:
    """ComfyUI as a subprocess with folders of its own, in which this pack is the only one.

    base: a folder, empty but for what shall be in `models`, `custom_nodes` and `packages`, where Python looks for more
    packages; flags: further ones of ComfyUI's command line; cpu: without a graphics card, and with permissions that
    hold for it as for any user.
    """

    def __init__(self, checkout: Checkout, base: Path, *flags: str, cpu: bool = True):
        self.checkout, self.base = checkout, base
        self.log_file = base / "log.txt"
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / "cascade-nodes"
        if not link.exists():
            link.symlink_to(PACK)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [checkout.python, "main.py", "--port", str(self.port), "--base-directory", base]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--cpu"] if cpu else []
        command += ["--database-url", f"sqlite:///{base / 'comfyui.db'}", *flags]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=checkout.path,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(base / "packages")},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=respect_permissions if cpu else None,
            )
        self._wait()

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The JSON at a path of its HTTP API."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.load(answer)

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.stop()

    def _wait(self) -> None:
        """Waits until the server answers; RuntimeError, with the end of its log, if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI in {self.checkout.path} did not start:\n{self.log[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
