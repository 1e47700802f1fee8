"""ComfyUI itself, in every version found on this machine.

Slow work is never done twice: all tests on a version's server run in one process, and so do all tests of numbers that
are measured inside ComfyUI, which are measured together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
from PIL import Image

from cascade_nodes.headless import run_graph
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, PACK, Checkout, Outcome, Server
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.nodes.tiny import write_cascade

TESTS = Path(__file__).parent
TEST_NODES = TESTS / "nodes"
EXAMPLE_PICTURES = PACK / "example_workflows" / "input"
MISSING = "no ComfyUI to test against: set COMFYUI_PATH, or see docs/testing.md"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that takes `checkout` once for each version, all tests of one version together."""
    if "checkout" in metafunc.fixturenames:
        checkouts = CHECKOUTS or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=MISSING))]
        ids = [one.version for one in CHECKOUTS] or None
        metafunc.parametrize("checkout", checkouts, ids=ids, scope="session")


# What a test with one of these fixtures shares with others; the first ones are started first, as they take longest.
GROUPS = {
    "server": "server {}",
    "measured": "inside {}",
    "published": "published files",
    "checkout": "ComfyUI {}",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups these tests by version and by shared fixtures, and runs them before all others."""

    def shared(item: pytest.Item) -> list[str]:
        # All tests come here, and those of other folders may have fixtures of these names.
        if not item.path.is_relative_to(TESTS):
            return []
        return [name for name in GROUPS if name in getattr(item, "fixturenames", ())]

    def place(item: pytest.Item) -> int:
        names = shared(item)
        return list(GROUPS).index(names[0]) if names else len(GROUPS)

    items.sort(key=place)
    for item in items:
        names = shared(item)
        if names and isinstance(item, pytest.Function):
            version = getattr(item.callspec.params["checkout"], "version", "none")
            if item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(GROUPS[names[0]].format(version)))
            if names[0] == "published" and version not in ("none", CHECKOUTS[-1].version):
                item.add_marker(pytest.mark.nightly)  # minutes and gigabytes: the newest alone by day


def prepare(base: Path) -> Path:
    """A folder for a server, with a tiny cascade; the pack brings the pictures of the examples itself.

    The tests' own nodes are a pack in it, and training's accelerate is at hand.
    """
    write_cascade(base / "models")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "cascade-tests").symlink_to(TEST_NODES)
    (base / "packages").mkdir()
    for path in Path(accelerate.__file__).parents[1].glob("accelerate*"):
        # It needs nothing that ComfyUI lacks.
        (base / "packages" / path.name).symlink_to(path)
    return base


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Checkout], Server]]:
    """Gives a running ComfyUI of a version; each is started once, when it is first asked for."""
    running: dict[Checkout, Server] = {}

    def start(checkout: Checkout) -> Server:
        if checkout not in running:
            base = prepare(tmp_path_factory.mktemp(f"comfyui_{checkout.version}"))
            running[checkout] = Server(checkout, base)
        return running[checkout]

    yield start
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Callable[[Checkout, str], dict[str, Any]]:
    """Gives what a script of `inside/` measures in a version.

    One process measures for all tests of this session, because importing ComfyUI takes as long as most scripts.
    """
    items = [item for item in request.session.items if "measured" in getattr(item, "fixturenames", ())]
    scripts = list(dict.fromkeys(script_of(item.path) for item in items))
    outcomes: dict[Checkout, dict[str, Outcome]] = {}

    def measured(checkout: Checkout, script: str) -> dict[str, Any]:
        if checkout not in outcomes:
            outcomes[checkout] = checkout.inside(*scripts)
        return outcomes[checkout][script].numbers

    return measured


@pytest.fixture
def measured(
    request: pytest.FixtureRequest,
    checkout: Checkout,
    measurements: Callable[[Checkout, str], dict[str, Any]],
) -> dict[str, Any]:
    """Measurements of the script with the same name as the test's file."""
    return measurements(checkout, script_of(request.path))


def script_of(test_file: Path) -> str:
    """The script of `inside/` whose numbers a test file looks at."""
    return test_file.stem.removeprefix("test_")


@pytest.fixture(scope="session")
def server(checkout: Checkout, servers: Callable[[Checkout], Server]) -> Server:
    """A ComfyUI that is running, shared by the tests of its version."""
    return servers(checkout)


@pytest.fixture(scope="session")
def right_pictures(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """The pictures that a graph saves without ComfyUI, (H, W, 3) uint8; each graph runs once."""
    models = tmp_path_factory.mktemp("models")
    write_cascade(models)
    pictures_by_name: dict[str, list[np.ndarray]] = {}

    def pictures(graph: dict[str, Any]) -> list[np.ndarray]:
        key = json.dumps(graph, sort_keys=True)
        if key not in pictures_by_name:
            folder = tmp_path_factory.mktemp("headless")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CASCADE_MODELS", str(models))
                run_graph(graph, input_folder=EXAMPLE_PICTURES, output_folder=folder)
            pictures_by_name[key] = [
                np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))
            ]
        return pictures_by_name[key]

    return pictures


@pytest.fixture(scope="session")
def right_picture(
    right_pictures: Callable[[dict[str, Any]], list[np.ndarray]],
) -> Callable[[dict[str, Any]], np.ndarray]:
    """The picture that a graph saves without ComfyUI, where it saves a single one."""

    def picture(graph: dict[str, Any]) -> np.ndarray:
        (only,) = right_pictures(graph)
        return only

    return picture


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A tab of its own for each test."""
    with Client(server) as tab:
        yield tab
