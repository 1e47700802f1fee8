"""Machine and versions behind a report, without the names of the machine and its user."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...nodes.hosts.roles import PACK

_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pillow", "diffusers")


def versions() -> dict[str, str | None]:
    """Versions of the project, Python and libraries; None for a library that is not installed."""
    from ... import __version__

    libraries = {name: _version(name) for name in _LIBRARIES}
    return {
        "cascade-nodes": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **libraries,
    }


def machine() -> dict[str, Any]:
    """Processor, memory and graphics cards."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": cores,
        "memory": _memory("MemTotal"),
        "cuda": torch.version.cuda,
        "cards": [_card(index) for index in range(torch.cuda.device_count())],
    }


def free_memory() -> int | None:
    """Bytes of main memory available without swapping; None where the system does not report them."""
    return _memory("MemAvailable")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the pack was cloned at, with `-dirty` where files were changed since."""
    if not (PACK / ".git").exists():  # inside another repository, git would report a foreign commit
        return None
    command = ["git", "-C", str(PACK), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in sizes), None)


def _card(index: int) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(index)
    return {
        "name": card.name,
        "memory": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
    }
