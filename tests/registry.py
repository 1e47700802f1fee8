"""What the Comfy Registry is given: the files of its archive, and the steps of the workflow that publishes them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "publish.yml"
LARGEST_ARCHIVE = 70_000_000  # bytes
OWNER = "someone"


def tracked_names(*options: str) -> set[str]:
    """The files that git tracks, of which options choose some."""
    command = ["git", "ls-files", "-z", "--cached", *options]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in answer.stdout.split("\0") if (ROOT / name).is_file()}


def archive_names() -> set[str]:
    """The files that comfy-cli packs: tracked ones that .comfyignore, in a .gitignore's syntax, does not name."""
    return tracked_names() - tracked_names("--ignored", "--exclude-from=.comfyignore")


def publishing_steps() -> dict[str, str]:
    """{name: script} of the workflow's own steps, in order."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return {step["name"]: step["run"] for step in workflow["jobs"]["publish"]["steps"] if "run" in step}


def run_step(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a step as GitHub does, in a repository of `someone`."""
    values: Mapping[str, str] = {
        **os.environ,
        "DO_NOT_TRACK": "1",
        "GITHUB_REPOSITORY": f"{OWNER}/cascade-nodes",
        "PUBLISHER": OWNER,
        **environment,
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, check=False)
