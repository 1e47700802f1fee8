"""The benchmarks' own modules, which are no package: they find each other as files beside the program that is run."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """One of them by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
