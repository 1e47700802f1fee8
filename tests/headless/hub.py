"""A stand-in for the Hugging Face hub on 127.0.0.1: file metadata, and bytes from another host, with faults."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        hub, path = self.server, self.path
        hub.asked.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        if path.startswith("/storage/"):
            self.send_bytes(hub.storage[path.removeprefix("/storage/")])
            return
        match = _RESOLVE.fullmatch(path)
        if hub.refusal is not None:
            status, code = hub.refusal
            self.end(status, {"X-Error-Code": code} if code else {})
        elif match is None or match["revision"] not in ("main", COMMIT):
            self.end(404, {"X-Error-Code": "RevisionNotFound"})
        elif (match["repo"], match["path"]) not in hub.files:
            self.end(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.redirect(hub.files[match["repo"], match["path"]])

    def redirect(self, content: bytes) -> None:
        """Redirects as the hub does for large files: what they are, and where their bytes are."""
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(self.server.stated_size or len(content)),
            "X-Linked-Etag": f'"{sha256}"',
            "X-Xet-Hash": sha256,
            "Link": f'<{self.server.url}/xet-auth>; rel="xet-auth"',
            "Location": self.server.location
            or f"http://localhost:{self.server.server_port}/storage/{sha256}",
        }
        self.end(
            302, {name: value for name, value in headers.items() if name not in self.server.silent_about}
        )

    def send_bytes(self, content: bytes) -> None:
        hub, start, status = self.server, 0, 200
        if hub.knows_range and (byte_range := self.headers.get("Range")):
            start, status = int(byte_range.removeprefix("bytes=").rstrip("-")), 206
        remaining = content[start:]
        if hub.storage_status is not None:
            status = hub.storage_status
        self.send_response(status)
        if hub.endless is None:
            self.send_header("Content-Length", str(len(remaining)))
        if status == 206:
            total = len(content) if hub.stated_range is None else hub.stated_range
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if hub.endless is not None:
            with suppress(OSError):  # until the client goes away
                self.wfile.write(remaining)
                while not hub.released.is_set():
                    self.wfile.write(hub.endless)
            self.close_connection = True
        elif hub.cuts:
            self.wfile.write(remaining[: hub.cuts.pop(0)])
            if hub.after_cut is not None:
                hub.refusal, hub.after_cut = hub.after_cut, None
            hub.cut.set()
            if hub.stalls:
                hub.released.wait()
            self.close_connection = True
        else:
            self.wfile.write(remaining)

    def end(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class Hub(ThreadingHTTPServer):
    """Starts on a free port.

    files         {(repo, path): bytes}
    storage       {sha256: bytes} that are sent for it, the files' own unless a test damages them
    asked         (method, path, headers) of every request
    refusal       (status, X-Error-Code) that every question about a file gets
    cuts          how many bytes each of the next transfers sends before its connection ends
    after_cut     the refusal from the next cut on
    stalls        whether a cut transfer waits for `released` before its connection ends
    knows_range   whether transfers may begin in the middle
    silent_about  headers that are left out
    stated_size   what every file is said to have, instead of its own
    stated_range  the end that Content-Range states, instead of the file's own
    endless       what is sent for ever after a file, without a Content-Length
    storage_status the status of every transfer, instead of the right one
    location      where the bytes are said to be, instead of the storage
    """

    daemon_threads = True

    def __init__(self, files: dict[tuple[str, str], bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.storage = {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.refusal: tuple[int, str] | None = None
        self.cuts: list[int] = []
        self.after_cut: tuple[int, str] | None = None
        self.stalls = False
        self.knows_range = True
        self.silent_about: set[str] = set()
        self.stated_size: int | None = None
        self.stated_range: int | None = None
        self.endless: bytes | None = None
        self.storage_status: int | None = None
        self.location: str | None = None
        self.cut, self.released = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        """The Range of every transfer, in order."""
        return [headers.get("range") for _, path, headers in self.asked if path.startswith("/storage/")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that go away are part of the tests."""

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
