"""Workflows, hooks and forms: the commands and files that they name are there, and versions agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in read(workflow)["jobs"].values() for step in job.get("steps", ())]


def commands(workflow: Path) -> str:
    matrix = re.findall(r"^ +tests: (.+)$", workflow.read_text(encoding="utf-8"), re.MULTILINE)
    return "\n".join([*(step["run"] for step in steps(workflow) if "run" in step), *matrix])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_what_is_there(workflow):
    text = commands(workflow)
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make ([\w./-]+)", text, re.MULTILINE)) <= set(targets)
    files = re.findall(r"(?<![\w/])(?:tests|docs|benchmarks|\.github)/[\w./-]*\w", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    for job in read(workflow)["jobs"].values():
        assert "uses" in job or "timeout-minutes" in job or workflow.stem == "publish"
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    assert read(workflow)["permissions"] == {"contents": "read"}  # a job that writes says so itself


def test_the_matrix_is_what_the_project_promises():
    jobs = read(GITHUB / "workflows" / "test.yml")["jobs"]
    least, most = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    expected = [f"3.{minor}" for minor in range(int(least), int(most))]
    assert jobs["core"]["strategy"]["matrix"]["python"] == expected
    floor = PROJECT["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert jobs["comfyui"]["strategy"]["matrix"]["comfyui"] == [f"v{floor}", "master"]
    assert jobs["gpu"]["if"] == "inputs.gpu"


def test_hooks_are_of_the_versions_that_the_tests_use():
    repositories = {
        entry["repo"].split("/")[-1]: entry for entry in read(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    lock = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
    assert f"ruff=={repositories['ruff-pre-commit']['rev'].removeprefix('v')}\n" in lock
    codespell = repositories["codespell"]["rev"].removeprefix("v")
    assert f"codespell=={codespell}" in commands(GITHUB / "workflows" / "test.yml")
    lint = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in repositories["local"]["hooks"]:
        assert hook["entry"].replace(".venv/bin", "$(BIN)") in lint


@pytest.mark.parametrize(
    "form", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_is_whole(form):
    content = read(form)
    assert {"name", "description", "labels", "body"} <= content.keys()
    fields = [entry for entry in content["body"] if entry["type"] != "markdown"]
    assert len({entry["id"] for entry in fields}) == len(fields)
    assert all(entry["attributes"]["label"] for entry in fields)


def notes(tag: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, GITHUB / "release_notes.py", tag]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_release_is_of_the_version_that_all_files_state():
    version = PROJECT["project"]["version"]
    released = notes(f"v{version}")
    assert released.returncode == 0, released.stderr
    assert released.stdout.strip()
    other = notes("v9.9.9")
    assert other.returncode == 1
    assert f"pyproject.toml has the version {version}" in other.stderr
