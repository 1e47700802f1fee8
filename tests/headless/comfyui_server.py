"""ComfyUI's HTTP API on 127.0.0.1, as far as the client uses it, executing the toy graphs for real."""

from __future__ import annotations

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.builtin import BUILTIN_NODES
from cascade_nodes.headless.execution import Executor
from cascade_nodes.headless.folders import Folders, using_folders
from cascade_nodes.headless.registry import by_id
from cascade_nodes.headless.validation import Validation, validate
from cascade_nodes.tests.headless.toy_nodes import TOYS

NODES = by_id(BUILTIN_NODES) | TOYS


class Handler(BaseHTTPRequestHandler):
    server: ComfyUI

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts = url.path.strip("/").split("/")
        server = self.server
        if parts[0] == "queue":
            queued = [[number, prompt_id, {}, {}, []] for number, prompt_id in enumerate(server.pending)]
            running = queued[:1] if server.started else []
            self.answer({"queue_running": running, "queue_pending": queued[len(running) :]})
        elif parts[0] == "history":
            server.looks += 1
            if server.looks >= server.patience:
                server.finish_all()
            entry = server.history.get(parts[1])
            self.answer({parts[1]: entry} if entry else {})
        elif parts[0] == "object_info":
            info = {parts[1]: NODES[parts[1]].GET_NODE_INFO_V1()} if parts[1] in NODES else {}
            self.answer(info)
        elif parts[0] == "view":
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            folder = server.folders.of_kind(query["type"]) / query.get("subfolder", "")
            self.send(200, (folder / query["filename"]).read_bytes())
        else:
            self.send(404, b"404: Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posts.append((self.path, body))
        if self.path != "/prompt":
            self.send(200, b"")
            return
        with using_folders(self.server.folders):
            validation = validate(body["prompt"], NODES)
        if validation.error is not None:
            self.answer({"error": validation.error, "node_errors": validation.node_errors}, 400)
            return
        prompt_id = str(uuid.uuid4())
        self.server.pending[prompt_id] = validation
        self.answer({"prompt_id": prompt_id, "number": 0, "node_errors": validation.node_errors})

    def answer(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode())

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class ComfyUI(ThreadingHTTPServer):
    """Starts on a free port; executes what is queued at the `patience`-th look at its history."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders = Folders(folder / "input", folder / "output")
        self.pending: dict[str, Validation] = {}
        self.history: dict[str, dict[str, Any]] = {}
        self.posts: list[tuple[str, Any]] = []
        self.patience = 2
        self.looks = 0
        self.started = True
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def finish_all(self) -> None:
        for prompt_id, validation in list(self.pending.items()):
            self.history[prompt_id] = self._execute(validation)
            del self.pending[prompt_id]

    def _execute(self, validation: Validation) -> dict[str, Any]:
        try:
            with using_folders(self.folders):
                result = Executor().run(validation)
        except CascadeError as error:
            cause = error.__cause__ or error
            data = {"node_id": "1", "node_type": "LoadImage", "exception_type": type(cause).__name__}
            messages = [
                ["execution_start", {}],
                ["execution_error", data | {"exception_message": f"{cause}\n"}],
            ]
            return {
                "outputs": {},
                "status": {"status_str": "error", "completed": False, "messages": messages},
            }
        status = {"status_str": "success", "completed": True, "messages": []}
        return {"outputs": result.outputs, "status": status}
