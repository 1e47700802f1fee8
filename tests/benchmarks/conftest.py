"""Access to the benchmarks' modules, which are not a package: each finds the others as files beside it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one of the benchmarks' modules by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
