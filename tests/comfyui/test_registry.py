"""What the registry's own tool packs is published as the workflow does it, and is all that ComfyUI needs.

The registry is a stand-in at the address that the tool has for its developers; nothing leaves this machine but what pip
asks for to install the tool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_nodes.tests.comfyui.checkout import PACK, Checkout, Server
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.conftest import prepare
from cascade_nodes.tests.comfyui.test_examples import EXAMPLES, uses_the_demo
from cascade_nodes.tests.registry import (
    LARGEST_ARCHIVE,
    OWNER,
    archive_names,
    publishing_steps,
    run_step,
)

pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("registry")]  # its stand-in has one port
KEY = "a key of the tests"
ADDRESS = ("localhost", 8080)  # comfy-cli's, where ENVIRONMENT is dev


@dataclass
class Registry:
    """What it was asked for: the node that was announced, and the archive that was uploaded."""

    announced: dict[str, dict[str, Any]] = field(default_factory=dict)  # path: body
    archive: bytes = b""


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    """The two calls of a publication."""
    heard = Registry()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_POST(self) -> None:
            body = json.loads(self._body())
            heard.announced[self.path] = body
            version = {"id": "1", "deprecated": False, "downloadUrl": "", "changelog": "", "dependencies": []}
            version["version"] = body["node_version"]["version"]
            address = f"http://{ADDRESS[0]}:{ADDRESS[1]}/archive"
            self._answer(201, {"node_version": version, "signedUrl": address})

        def do_PUT(self) -> None:
            heard.archive = self._body()
            self._answer(200, {})

        def log_message(self, format: str, *values: Any) -> None:
            """Keeps the tests' output quiet."""

    server = ThreadingHTTPServer(ADDRESS, Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield heard
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def publication(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """After every step of the workflow, in a fresh clone of what is committed here."""
    folder = tmp_path_factory.mktemp("publishing")
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{PACK}", clone], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "python"], check=True)
    environment = {
        "HOME": str(folder),
        "PATH": os.pathsep.join([str(folder / "python" / "bin"), os.environ["PATH"]]),
        "ENVIRONMENT": "dev",
        "NO_PROXY": ADDRESS[0],
        "REGISTRY_ACCESS_TOKEN": KEY,
    }
    for name, script in publishing_steps().items():
        step = run_step(script, clone, **environment)
        assert step.returncode == 0, f"{name}:\n{step.stdout}\n{step.stderr}"
    return registry


@pytest.fixture(scope="module")
def unpacked(publication: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive as ComfyUI-Manager unpacks it: a folder called as the node's id is."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "node.zip").write_bytes(publication.archive)
    with zipfile.ZipFile(folder / "node.zip") as archive:
        archive.extractall(folder / "cascade-nodes")
    return folder / "cascade-nodes"


def test_the_workflow_announces_the_node_and_uploads_its_archive(publication):
    ((path, body),) = publication.announced.items()
    assert path == f"/publishers/{OWNER}/nodes/cascade-nodes/versions"
    assert body["personal_access_token"] == KEY
    node = body["node"]
    assert node["repository"] == f"https://github.com/{OWNER}/cascade-nodes"
    assert node["icon"].endswith("/icon.svg")
    assert (node["name"], node["supported_comfyui_version"]) == ("Cascade Nodes", ">=0.3.64")
    assert "MIT" in node["license"]
    assert len(publication.archive) <= LARGEST_ARCHIVE


def test_the_archive_holds_what_the_daily_tests_say(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert files == archive_names()


def test_every_example_runs_from_the_archive(
    checkout: Checkout, unpacked: Path, right_pictures, tmp_path: Path
):
    base = prepare(tmp_path / "comfyui")
    (base / "custom_nodes" / "cascade-nodes").symlink_to(unpacked)
    with Server(checkout, base) as server, Client(server) as client:
        templates = server.get("/api/workflow_templates")
        assert "cascade-nodes" in templates
        for name, graph in EXAMPLES.items():
            if not uses_the_demo(name):
                continue
            execution = client.run(graph)
            assert execution.error is None, name
            pictures, expected = client.pictures(execution), right_pictures(graph)
            assert len(pictures) == len(expected) > 0
            for picture, right in zip(pictures, expected, strict=True):
                assert np.abs(picture.astype(int) - right).max() <= 1, name
