"""A client of ComfyUI's HTTP and websocket API, as a front end is one."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from cascade_nodes.tests.comfyui.checkout import Server

TEXT = 3  # the kind of binary message
END = {"execution_success", "execution_error", "execution_interrupted"}


@dataclass
class Execution:
    """All that the server sent about one prompt: its messages in order, and the previews and texts between them."""

    prompt_id: str
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[np.ndarray] = field(default_factory=list)  # (H, W, 3) uint8
    texts: list[tuple[str, str]] = field(default_factory=list)  # node, what it says

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of every message of a kind."""
        return [data for name, data in self.messages if name == kind]

    @property
    def executed(self) -> list[str]:
        """Nodes that ran, in order."""
        return [data["node"] for data in self.of("executing") if data["node"] is not None]

    @property
    def cached(self) -> list[str]:
        """Nodes whose outputs were there already."""
        return [node for data in self.of("execution_cached") for node in data["nodes"]]

    @property
    def error(self) -> str | None:
        """The message of the node that failed."""
        return next((data["exception_message"] for data in self.of("execution_error")), None)


class Client:
    """One browser tab: its messages come over one websocket."""

    def __init__(self, server: Server):
        self.server = server
        self.id = str(uuid.uuid4())
        address = f"ws://127.0.0.1:{server.port}/ws?clientId={self.id}"
        self._connection = connect(address, max_size=None, open_timeout=60)

    def __enter__(self) -> Client:
        self.socket: ClientConnection = self._connection.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        """(status, JSON or None) of a POST."""
        body = json.dumps(content).encode()
        request = urllib.request.Request(
            f"{self.server.url}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read(), error.code
        return status, json.loads(text) if text else None

    def queue(self, graph: dict[str, Any], **extra_data: Any) -> str:
        """The id of a prompt that was accepted whole. extra_data: what a front end's settings add to it."""
        content = {"prompt": graph, "client_id": self.id, "extra_data": extra_data}
        status, answer = self.post("/prompt", content)
        assert status == 200, answer
        assert not answer["node_errors"], answer["node_errors"]
        return answer["prompt_id"]

    def follow(
        self, prompt_id: str, on_message: Callable[[str, dict[str, Any]], None] | None = None
    ) -> Execution:
        """Follows a prompt to its end; returns all that the server sent about it."""
        execution = Execution(prompt_id)
        for kind, data in self._messages():
            if kind == "preview":
                execution.previews.append(data["picture"])
                continue
            if kind == "text":
                execution.texts.append((data["node"], data["text"]))
                continue
            if data.get("prompt_id") != prompt_id:
                continue
            execution.messages.append((kind, data))
            if on_message is not None:
                on_message(kind, data)
            if kind in END:
                return execution
        raise AssertionError("The server hung up.")

    def run(self, graph: dict[str, Any], **extra_data: Any) -> Execution:
        """Queues a graph and follows it to its end."""
        return self.follow(self.queue(graph, **extra_data))

    def pictures(self, execution: Execution) -> list[np.ndarray]:
        """The pictures that a prompt saved, (H, W, 3) uint8; not those that it only showed."""
        pictures = []
        for data in execution.of("executed"):
            for entry in (data["output"] or {}).get("images", []):
                if entry["type"] != "output":
                    continue
                query = urllib.parse.urlencode(entry)
                with urllib.request.urlopen(f"{self.server.url}/view?{query}", timeout=60) as answer:
                    pictures.append(np.asarray(Image.open(BytesIO(answer.read())).convert("RGB")))
        return pictures

    def _messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for message in self.socket:
            if isinstance(message, bytes) and int.from_bytes(message[:4]) == TEXT:
                end = 8 + int.from_bytes(message[4:8])  # of the node's id
                yield "text", {"node": message[8:end].decode(), "text": message[end:].decode()}
                continue
            if isinstance(message, bytes):
                jpeg = message[message.index(b"\xff\xd8") :]  # what is before it differs between versions
                yield "preview", {"picture": np.asarray(Image.open(BytesIO(jpeg)).convert("RGB"))}
                continue
            content = json.loads(message)
            yield content["type"], content.get("data") or {}
