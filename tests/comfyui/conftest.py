"""ComfyUI itself, in every version that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, Checkout, Server
from cascade_nodes.tests.comfyui.client import Client

HERE = Path(__file__).parent
MISSING = "no ComfyUI to test against: set COMFYUI_PATH, or see docs/testing.md"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that takes `checkout` once for each version, all tests of one version together."""
    if "checkout" in metafunc.fixturenames:
        found = CHECKOUTS or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=MISSING))]
        ids = [one.version for one in CHECKOUTS] or None
        metafunc.parametrize("checkout", found, ids=ids, scope="session")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Nobody shall think that these tests passed where they did not run."""
    if not CHECKOUTS:
        terminalreporter.section("NOT TESTED IN COMFYUI", sep="!", red=True)
        terminalreporter.line(f"The tests in tests/comfyui were skipped: {MISSING}.")


@pytest.fixture(scope="session")
def server(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI that is running, shared by the tests of its version."""
    with Server(checkout, tmp_path_factory.mktemp(f"comfyui_{checkout.version}")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A tab of its own for each test."""
    with Client(server) as tab:
        yield tab
