"""Client of a running ComfyUI's HTTP API: queues a graph, waits, and downloads the pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from ..cascade_core.errors import CascadeError
from .folders import Folders
from .graph import Graph
from .results import Observer, Result, SavedPicture
from .saving import save_new
from .sentences import GraphError

_TIMEOUT = 60.0  # seconds for one request, not for the run
_PAUSES = (0.1, 0.2, 0.5, 1.0)  # seconds between two looks at the history; the last one repeats


class Server:
    """ComfyUI at a URL such as http://127.0.0.1:8188. All methods raise CascadeError that names it."""

    def __init__(self, url: str):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise CascadeError(f"--server {url!r} is not an address like http://127.0.0.1:8188.")

    def get(self, path: str) -> Any:
        """Returns the JSON at a path."""
        return self._json(path, self._request(path))

    def download(self, path: str) -> bytes:
        """Returns the bytes at a path."""
        return self._request(path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Returns the JSON answer to a JSON body, None where it is empty. Raises GraphError for a refused graph."""
        answer = self._request(path, json.dumps(body).encode())
        return self._json(path, answer) if answer.strip() else None

    def input_types(self, class_type: str) -> dict[str, str] | None:
        """Returns {input: type} of one of the server's nodes, None for an unknown one."""
        info = self.get(f"/object_info/{quote(class_type, safe='')}").get(class_type)
        if info is None:
            return None
        kinds = (info["input"].get(kind) or {} for kind in ("required", "optional"))
        return {name: str(entry[0]) for inputs in kinds for name, entry in inputs.items()}

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with urlopen(Request(self.url + path, data=body, headers=headers), timeout=_TIMEOUT) as answer:
                return answer.read()
        except HTTPError as error:
            answered = CascadeError(f"{self.url}{path} answered {error.code} {error.reason}.")
            raise _refusal(error.read()) or answered from error
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            advice = "start ComfyUI, correct --server, or leave it out to run here"
            raise CascadeError(f"No ComfyUI answers at {self.url} ({reason}); {advice}.") from error

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise CascadeError(f"{self.url}{path} did not answer with JSON; is it a ComfyUI?") from error


def _refusal(content: bytes) -> GraphError | None:
    """Returns the validation errors in the body of a 400, or None for another body."""
    try:
        answer = json.loads(content)
    except ValueError:
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return None
    return GraphError(answer["error"], answer.get("node_errors") or {})


def run_on_server(server: Server, graph: Graph, folders: Folders, observer: Observer | None = None) -> Result:
    """Runs a graph on a server and downloads the saved pictures into `folders.output`.

    Outputs that the server found invalid are in `Result.node_errors`. When interrupted, the graph is removed
    from the server first. Raises CascadeError where the server cannot be reached, refuses the graph (GraphError),
    fails while executing it or loses it.
    """
    observer = observer or Observer()
    started = time.perf_counter()
    answer = server.post("/prompt", {"prompt": graph})
    prompt_id = answer["prompt_id"]
    try:
        history = _wait(server, prompt_id, observer)
    except KeyboardInterrupt:
        server.post("/queue", {"delete": [prompt_id]})
        server.post("/interrupt", {"prompt_id": prompt_id})
        raise
    _raise_if_failed(history, server)
    result = Result(outputs=history["outputs"], node_errors=answer.get("node_errors") or {})
    for node_id, ui in history["outputs"].items():
        for entry in ui.get("images", ()):
            path = _download(server, entry, folders)
            picture = SavedPicture(path, node_id, time.perf_counter() - started)
            result.pictures.append(picture)
            observer.picture_saved(picture)
    result.seconds = time.perf_counter() - started
    return result


def _wait(server: Server, prompt_id: str, observer: Observer) -> dict[str, Any]:
    """Polls until a prompt has a history entry, and returns it."""
    looks = 0
    started = time.monotonic()
    while True:
        queue = server.get("/queue")  # before the history: a prompt that leaves the queue enters the history
        history = server.get(f"/history/{prompt_id}")
        if prompt_id in history:
            return history[prompt_id]
        running, pending = ([item[1] for item in queue[f"queue_{kind}"]] for kind in ("running", "pending"))
        if prompt_id not in running + pending:
            raise CascadeError(f"{server.url} lost the graph: it was taken off the queue, or it restarted.")
        ahead = len(running) + sum(queued != prompt_id for queued in pending)
        state = "running" if prompt_id in running else f"waiting behind {ahead} in the queue"
        observer.status(f"{server.url}: {state}, {time.monotonic() - started:.0f} s")
        time.sleep(_PAUSES[min(looks, len(_PAUSES) - 1)])
        looks += 1


def _raise_if_failed(history: dict[str, Any], server: Server) -> None:
    status = history.get("status") or {}
    if status.get("status_str", "success") == "success":
        return
    for name, data in status.get("messages") or []:
        if name == "execution_error":
            node = f"{data['node_id']} ({data['node_type']})"
            failure = f"{data['exception_type']}: {str(data['exception_message']).strip()}"
            raise CascadeError(f"Node {node} failed on {server.url} with {failure}")
        if name == "execution_interrupted":
            raise CascadeError(f"The run was interrupted on {server.url}.")
    raise CascadeError(f"The run failed on {server.url}, which does not say why; see its log.")


def _download(server: Server, entry: dict[str, str], folders: Folders) -> Path:
    """Saves one picture under its name, or the next free one: nothing is overwritten."""
    kind, name, subfolder = entry.get("type", "output"), entry["filename"], entry.get("subfolder", "")
    place = PurePosixPath(subfolder.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or PurePosixPath(name.replace("\\", "/")).name != name:
        raise CascadeError(f"{server.url} names a picture outside the output folder: {subfolder}/{name}.")
    data = server.download("/view?" + urlencode({"filename": name, "subfolder": subfolder, "type": kind}))
    root = folders.temp if kind == "temp" else folders.output
    path = PurePosixPath(name)

    def numbered(counter: int) -> str:
        return name if counter == 0 else f"{path.stem}_{counter}{path.suffix}"

    return save_new(root / place, numbered, 0, data)
