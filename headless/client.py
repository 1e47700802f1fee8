"""Client of a running ComfyUI's HTTP API: queues a graph, waits, and downloads the pictures.

A server's answers are not trusted: each is bounded in bytes and seconds, its structure is checked while reading, and
only pictures are saved, under names that stay inside the output folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from PIL import Image

from ..cascade_core.errors import CascadeError, printable, quoted
from ..cascade_core.file_names import inside, name_fault, path_fault
from ..cascade_core.pictures import PictureError, open_picture
from .folders import Folders
from .graph import Graph, name_of
from .registry import InputInfo
from .results import Observer, Result, SavedPicture
from .saving import check_prefix, save_new
from .sentences import GraphError, sentences, shortened

_PAUSES = (0.1, 0.2, 0.5, 1.0)  # seconds between two polls of the history; the last one repeats


class ServerLostError(CascadeError):
    """The server cannot be reached, or has lost the graph, which may not be the graph's fault."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server's answers: bytes and seconds of each, and the number of pictures of a run."""

    json_bytes: int = 64 * 2**20  # a queue holds every graph that waits in it
    json_seconds: float = 60.0
    picture_bytes: int = 2**30
    picture_seconds: float = 600.0
    pictures: int = 10_000
    farewell_seconds: float = 3.0  # for removing a graph from the queue, while the user waits to exit


class Server:
    """ComfyUI at a URL such as http://127.0.0.1:8188. All methods raise CascadeError that names it."""

    def __init__(self, url: str, limits: Limits | None = None):
        self.url = _address(url)
        self.limits = limits or Limits()
        # No redirects, files or FTP, which a ComfyUI does not use.
        self._opener = OpenerDirector()
        for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
            self._opener.add_handler(handler)

    def get(self, path: str) -> Any:
        """Returns the JSON at a path."""
        return self._json(path, self._request(path, self.limits.json_bytes, self.limits.json_seconds))

    def download(self, path: str) -> bytes:
        """Returns the bytes at a path, such as a picture's."""
        return self._request(path, self.limits.picture_bytes, self.limits.picture_seconds)

    def post(self, path: str, body: dict[str, Any], seconds: float | None = None) -> Any:
        """Returns the JSON answer to a JSON body, None where it is empty. Raises GraphError for a refused graph."""
        seconds = self.limits.json_seconds if seconds is None else seconds
        answer = self._request(path, self.limits.json_bytes, seconds, json.dumps(body).encode())
        return self._json(path, answer) if answer.strip() else None

    def inputs_of(self, class_type: str) -> dict[str, InputInfo] | None:
        """Returns the inputs of one of the server's nodes in their order, None for an unknown one."""
        path = f"/object_info/{quote(class_type.encode(errors='surrogatepass'), safe='')}"
        with self.reading(path):
            info = self.get(path).get(class_type)
            if info is None:
                return None
            return {
                name: _input_info(entry, kind == "required")
                for kind in ("required", "optional")
                for name, entry in (info["input"].get(kind) or {}).items()
            }

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turns errors of parsing an answer into a sentence: its structure is not a ComfyUI's."""
        try:
            yield
        except CascadeError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CascadeError(
                f"{self._place(path)} did not answer as a ComfyUI does; is --server right, and is it one?"
            ) from error

    def _request(self, path: str, limit: int, seconds: float, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = Request(self.url + path, data=body, headers=headers)
        try:
            status, phrase, content = _exchange(self._opener, request, limit, seconds)
        except _Broken as error:
            raise ServerLostError(
                f"{self._place(path)} {error}; try again, or see that server's log."
            ) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            reason = printable(str(getattr(error, "reason", None) or error))
            advice = "start ComfyUI, correct --server, or leave it out to run here"
            raise ServerLostError(f"No ComfyUI answers at {self.url} ({reason}); {advice}.") from error
        if status // 100 == 2:
            return content
        with self.reading(path):
            refusal = _refusal(content)
        hint = (
            "; no redirection is followed, so give --server the final address" if status // 100 == 3 else ""
        )
        raise refusal or CascadeError(f"{self._place(path)} answered {status} {printable(phrase, 40)}{hint}.")

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise CascadeError(f"{self._place(path)} did not answer with JSON; is it a ComfyUI?") from error

    def _place(self, path: str) -> str:
        return f"{self.url}{path if len(path) <= 80 else f'{path[:80]}…'}"


def _input_info(entry: Any, required: bool) -> InputInfo:
    """An input from /object_info, where older nodes have the options of a Combo in place of its type."""
    options = dict(entry[1]) if len(entry) > 1 else {}
    if isinstance(entry[0], list):
        return InputInfo("COMBO", required, {**options, "options": entry[0]})
    return InputInfo(str(entry[0]), required, options)


class _Broken(Exception):  # noqa: N818 (the end of a sentence)
    """An answer that is cut off, too long or too slow."""


def _address(text: str) -> str:
    """A server's address as http(s)://host[:port][/path]. Raises CascadeError for any other."""
    if "@" in text.rpartition("://")[2].split("/")[0]:  # never shown, since it may be a password
        raise CascadeError(
            "--server holds a user name or a password, which a ComfyUI does not ask for; give the address alone."
        )
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        host = (url.hostname or "").encode("idna").decode()
        port = "" if url.port is None else f":{url.port}"
        path = quote(url.path.rstrip("/"), safe="/%")
    except ValueError:  # an invalid port, bracket or host
        host = port = path = ""
        url = urlsplit("")
    plain = all(character.isprintable() and character != " " for character in text)
    if plain and url.scheme in ("http", "https") and host and not (url.query or url.fragment):
        return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}{path}"
    raise CascadeError(f"--server {quoted(text)} is not an address like http://127.0.0.1:8188.")


def _exchange(opener: OpenerDirector, request: Request, limit: int, seconds: float) -> tuple[int, str, bytes]:
    """Sends a request; returns the answer's status, its phrase and its content.

    In a thread, because a socket's timeout ends neither a DNS lookup nor a header that arrives byte by byte.
    """
    answers: SimpleQueue[tuple[int, str, bytes] | Exception] = SimpleQueue()
    deadline = time.monotonic() + seconds

    def exchange() -> None:
        try:
            with opener.open(request, timeout=seconds) as answer:
                answers.put((answer.status, answer.reason, _read(answer, limit, deadline)))
        except Exception as error:  # raised again in the waiting thread
            answers.put(error)

    Thread(target=exchange, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except Empty:
        answer = TimeoutError()
    if isinstance(answer, TimeoutError):
        raise _Broken(f"did not answer in full within {seconds:.0f} s")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read(answer: HTTPResponse, limit: int, deadline: float) -> bytes:
    expected = answer.length  # None: the answer ends with the connection, or is chunked
    content = bytearray()
    while len(content) <= limit and (expected is None or len(content) < expected):
        if time.monotonic() > deadline:
            raise TimeoutError  # ignored: the caller has left already
        part = answer.read1(2**16)
        if not part:
            break
        content += part
    if len(content) > limit:
        raise _Broken(f"answered with more than {limit // 2**20} MiB")
    if expected is not None and len(content) < expected:
        raise _Broken(f"broke off after {len(content)} of {expected} bytes")
    return bytes(content)


def _refusal(content: bytes) -> GraphError | None:
    """Returns the validation errors in the body of a 400, or None for another body."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), dict):
        return None
    return GraphError(answer["error"], answer.get("node_errors") or {})


def run_on_server(
    server: Server,
    graph: Graph,
    folders: Folders,
    observer: Observer | None = None,
    extra_pnginfo: dict[str, Any] | None = None,
) -> Result:
    """Runs a graph on a server and downloads the saved pictures into `folders.output`.

    extra_pnginfo: data stored in pictures beside the graph, such as its workflow. Outputs that the server found
    invalid are in `Result.node_errors`. When interrupted, the graph is removed from the server first. Raises
    CascadeError where the server cannot be reached, refuses the graph (GraphError), fails while executing it or loses
    it; and, once the other pictures are saved, for a file that is not a picture or is not named as one.
    """
    observer = observer or Observer()
    started = time.perf_counter()
    _check_prefixes(graph, folders)
    prompt_id, node_errors = _queue(server, graph, extra_pnginfo)
    try:
        history = _wait(server, prompt_id, observer)
    except KeyboardInterrupt:
        seconds = server.limits.farewell_seconds
        with suppress(CascadeError):  # the user wants to exit, whether it answers or not
            server.post("/queue", {"delete": [prompt_id]}, seconds)
            server.post("/interrupt", {"prompt_id": prompt_id}, seconds)
        raise
    with server.reading("/history"):
        _raise_if_failed(history, server)
        outputs = history["outputs"]
        entries = [(node_id, entry) for node_id, ui in outputs.items() for entry in ui.get("images") or ()]
        pictures = [(node_id, _ServerFile.of(entry)) for node_id, entry in entries]
    result = Result(outputs=outputs, node_errors=node_errors)
    refused = []
    for node_id, file in pictures[: server.limits.pictures]:
        try:
            path = _download(server, file, folders)
        except _RefusedError as error:
            refused.append(str(error))
            continue
        picture = SavedPicture(path, node_id, time.perf_counter() - started)
        result.pictures.append(picture)
        observer.picture_saved(picture)
    if len(pictures) > server.limits.pictures:
        refused.append(
            f"{server.url} names {len(pictures)} pictures, of which the first {server.limits.pictures} were fetched."
        )
    if refused:
        raise CascadeError("\n".join(shortened(refused)))
    result.seconds = time.perf_counter() - started
    return result


def _check_prefixes(graph: Graph, folders: Folders) -> None:
    """Raises CascadeError for pictures that could not be saved here after the server has made them."""
    for node_id, node in graph.items():
        prefix = node["inputs"].get("filename_prefix")
        if node.get("class_type") == "SaveImage" and isinstance(prefix, str):
            try:
                check_prefix(prefix, folders.output)
            except CascadeError as error:
                raise CascadeError(f"Node {name_of(graph, node_id)}: {error}") from error


def _queue(server: Server, graph: Graph, extra_pnginfo: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Queues the graph; returns its id, and the errors of outputs that the server leaves out."""
    extra = {"extra_data": {"extra_pnginfo": extra_pnginfo}} if extra_pnginfo else {}
    answer = server.post("/prompt", {"prompt": graph, **extra})
    with server.reading("/prompt"):
        prompt_id, node_errors = answer["prompt_id"], answer.get("node_errors") or {}
        if not isinstance(prompt_id, str):
            raise TypeError("prompt_id is not a text")
        sentences(None, node_errors)  # fails here for malformed errors, which the caller will put into words
    return prompt_id, node_errors


def _wait(server: Server, prompt_id: str, observer: Observer) -> Any:
    """Polls until a prompt has a history entry, and returns it."""
    looks = 0
    started = time.monotonic()
    while True:
        queue = server.get("/queue")  # before the history, to which prompts move from the queue
        history = server.get(f"/history/{quote(prompt_id.encode(errors='surrogatepass'), safe='')}")
        with server.reading("/history"):
            if (entry := history.get(prompt_id)) is not None:
                return entry
        with server.reading("/queue"):
            running, pending = (
                [item[1] for item in queue[f"queue_{kind}"]] for kind in ("running", "pending")
            )
        if prompt_id not in running + pending:
            raise ServerLostError(
                f"{server.url} lost the graph: it was taken off the queue, or it restarted."
            )
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
            node = f"{printable(str(data['node_id']), 80)} ({printable(str(data['node_type']), 80)})"
            kind, text = str(data["exception_type"]), " ".join(str(data["exception_message"]).split())
            raise CascadeError(
                f"Node {node} failed on {server.url} with {printable(kind, 80)}: {printable(text, 1000)}"
            )
        if name == "execution_interrupted":
            raise CascadeError(f"The run was interrupted on {server.url}.")
    raise CascadeError(f"The run failed on {server.url}, which does not say why; see its log.")


class _RefusedError(CascadeError):
    """A file offered by a server as a picture that must not be saved."""


@dataclass(frozen=True)
class _ServerFile:
    """A file on the server, as named in its history."""

    name: str
    subfolder: str
    kind: str

    @classmethod
    def of(cls, entry: dict[str, Any]) -> _ServerFile:
        file = cls(entry["filename"], entry.get("subfolder") or "", entry.get("type") or "output")
        if not all(isinstance(value, str) for value in (file.name, file.subfolder, file.kind)):
            raise TypeError("names are texts")
        return file


def _download(server: Server, file: _ServerFile, folders: Folders) -> Path:
    """Saves one picture under its name, or the next free one: nothing is overwritten."""
    shown = quoted(f"{file.subfolder}/{file.name}".lstrip("/"))
    fault = path_fault(file.subfolder) or name_fault(file.name)
    root = folders.temp if file.kind == "temp" else folders.output
    folder = inside(root, file.subfolder) if fault is None else None
    if folder is None:
        raise _RefusedError(
            f"{server.url} names a picture {shown}, which {fault or 'leads out of the folder over a link'}; it was "
            "not saved."
        )
    query = urlencode({"filename": file.name, "subfolder": file.subfolder, "type": file.kind})
    content = server.download(f"/view?{query}")
    path = PurePosixPath(file.name)
    fault = _picture_fault(content, path.suffix)
    if fault is not None:
        raise _RefusedError(f"{server.url} sent {shown}, which {fault}; it was not saved.")

    def numbered(counter: int) -> str:
        return file.name if counter == 0 else f"{path.stem}_{counter}{path.suffix}"

    return save_new(folder, numbered, 0, content)


def _picture_fault(content: bytes, suffix: str) -> str | None:
    """Why bytes are not a picture of the kind that the file extension states, as the end of a sentence; or None."""
    try:
        with open_picture(content) as picture:
            picture.verify()
            kind = picture.format
    except PictureError as error:
        return f"is not a picture that can be read ({error.reason})"
    expected = Image.registered_extensions().get(suffix.lower())
    return None if kind == expected else f"is a {kind} picture under another ending"
