"""Settings of every test: one thread, which tests share a process, which are left to `make nightly`; and a report of
all that did not run.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import date

# Before anything imports torch, here and in the programs that tests start: most networks are so small that two threads
# take longer than one, and several processes with as many threads as cores many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

LOUD = {  # of two that fit, the first
    "tests/comfyui/browser/": "NOT TESTED IN A BROWSER",
    "tests/comfyui/": "NOT TESTED IN COMFYUI",
    "tests/gpu/": "NOT TESTED ON A GPU",
}
NIGHTLY = "left to make nightly"

# The files that take longest, longest first: with several processes a long one that begins last is waited for.
LONGEST = (
    "fuzz/test_fuzz.py",
    "notebooks/test_notebook.py",
    "core/test_training_tasks.py",
    "core/test_training_resume.py",
    "test_install.py",
    "docs/test_python_page.py",
    "docs/test_from_diffusers.py",
    "demo/test_door.py",
    "core/test_training_ranks.py",
    "engine/test_fp8.py",
    "demo/test_tasks.py",
    "demo/test_judge.py",
    "core/test_fp16.py",
    "demo/test_cascade.py",
    "headless/test_models.py",
    "bad_input/test_files.py",
    "headless/test_fetch.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run what is marked `nightly`, too")
    seed = "of what is tried at random, default: the day's date"
    parser.addoption("--seed", type=int, default=int(date.today().strftime("%Y%m%d")), help=seed)


def pytest_report_header(config: pytest.Config) -> str:
    return f"what is tried at random: --seed {config.getoption('seed')}"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of random tests, a new one every day; the head of the report states it."""
    return int(request.config.option.seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests by file, unless a file states other groups, so that shared fixtures are made once; longest files
    first.

    Tests marked `nightly` are skipped instead of deselected, since the reporting process does not see deselected ones.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {item.path.stem}"))
        if item.get_closest_marker("nightly") and not config.option.nightly:
            item.add_marker(pytest.mark.skip(reason=NIGHTLY))
    items.sort(key=place)


def place(item: pytest.Item) -> int:
    """Rank of a test's file among the longest; tests in ComfyUI, which have their own order, come first."""
    if "comfyui" in item.path.parts:
        return -1
    return next((i for i, name in enumerate(LONGEST) if item.path.match(f"tests/{name}")), len(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Makes skipped suites loud.

    It is here because with several processes the reporting one loads no conftest below this one.
    """
    reasons: dict[str, Counter[str]] = {folder: Counter() for folder in LOUD}
    nightly: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ").removesuffix(".")
        folder = next((folder for folder in LOUD if report.nodeid.startswith(folder)), None)
        if reason == NIGHTLY:
            nightly[report.nodeid.partition("::")[0]] += 1
        elif folder is not None:
            reasons[folder][reason] += 1
    for folder, counts in reasons.items():
        if counts:
            terminalreporter.section(LOUD[folder], sep="!", red=True)
        for reason, count in counts.items():
            terminalreporter.line(f"{count} tests in {folder} were skipped: {reason}.")
    if nightly:
        terminalreporter.section(f"{nightly.total()} TESTS ARE {NIGHTLY.upper()}", sep="!", yellow=True)
        for file, count in nightly.items():
            terminalreporter.line(f"{count} of {file}")
