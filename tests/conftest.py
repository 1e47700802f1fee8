"""Which tests share a process (`pytest --numprocesses 2 --dist loadgroup`), and a word on those that did not run."""

from __future__ import annotations

from collections import Counter

import pytest

LOUD = {  # of two that fit, the first
    "tests/comfyui/browser/": "NOT TESTED IN A BROWSER",
    "tests/comfyui/": "NOT TESTED IN COMFYUI",
    "tests/gpu/": "NOT TESTED ON A GPU",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of one file, unless it has said otherwise, so that what they share is made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name} {item.path.stem}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Nobody shall think that tests passed where they did not run.

    Here and not beside them: where there are several processes, the one that reports loads no conftest below this one.
    """
    reasons: dict[str, Counter[str]] = {folder: Counter() for folder in LOUD}
    for report in terminalreporter.stats.get("skipped", []):
        folder = next((folder for folder in LOUD if report.nodeid.startswith(folder)), None)
        if folder is not None:
            reasons[folder][report.longrepr[2].removeprefix("Skipped: ").removesuffix(".")] += 1
    for folder, found in reasons.items():
        if found:
            terminalreporter.section(LOUD[folder], sep="!", red=True)
        for reason, count in found.items():
            terminalreporter.line(f"{count} tests in {folder} were skipped: {reason}.")
