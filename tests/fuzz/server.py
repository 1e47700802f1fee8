"""A hostile ComfyUI on 127.0.0.1: what it answers to `cascade run --server` is cut, huge, slow or wrong."""

from __future__ import annotations

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

from PIL import Image

from cascade_nodes.headless.client import Limits, Server, run_on_server
from cascade_nodes.headless.folders import Folders
from cascade_nodes.headless.results import Observer
from cascade_nodes.headless.sources import Source, prepared
from cascade_nodes.tests.fuzz.pictures import spoiled
from cascade_nodes.tests.fuzz.values import TEXTS, odd_text, odd_value
from cascade_nodes.tests.fuzz.verdict import command, files_below
from cascade_nodes.tests.fuzz.weights import spoil

LIMITS = Limits(
    json_bytes=4 << 20,
    json_seconds=1.5,
    picture_bytes=8 << 20,
    picture_seconds=1.5,
    pictures=50,
    farewell_seconds=0.5,
)
GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}
NAMES = (
    ".bashrc", "../x.png", "/etc/x.png", "a/b.png", "a\\b.png", "link.png", "\x1b[31m.png", "a\nb.png", "a.exe",
    "a.png.exe", "a", "", ".", "..", "a.png ", "con.png",
    "x" * 300 + ".png", "\ud800.png", "a\0.png", "a.PNG", "a.jpg", "earlier.png", "a.json", "%2e%2e%2fx.png",
    "-rf.png", "\u202egnp.png", "a.png:b",
)  # fmt: skip
FOLDERS = (
    "",
    "",
    "sub",
    "sub/deep",
    "link",
    "..",
    "/etc",
    "../..",
    "sub/../..",
    ".",
    ".ssh",
    "a\\..\\..",
    "\0",
    "x" * 300,
    "earlier.png",
    "\x1b[2J",
    "temp",
)


@dataclass
class Plan:
    """The answers of a case, by the first part of a path."""

    random: Random
    answers: dict[str, bytes]
    behaviours: dict[str, str] = field(default_factory=dict)
    looks: int = 0


class World:
    def __init__(self, folder: Path):
        self.folder, self.output = folder, folder / "output"
        (folder / "graph.json").write_text(json.dumps(GRAPH))
        self.server = HostileServer()
        stream = io.BytesIO()
        Image.radial_gradient("L").resize((16, 16)).save(stream, "PNG")
        self.picture = stream.getvalue()

    def attempt(self, random: Random) -> None:
        self.server.plan = plan = self.plan(random)
        self.output.mkdir()
        (self.output / "earlier.png").write_bytes(b"earlier")
        (self.output / "link").symlink_to(self.folder)
        (self.output / "link.png").symlink_to(self.folder / "elsewhere.png")
        before = files_below(self.folder)
        try:
            if not plan.behaviours and random.random() < 0.5:
                options = ["--set", "1.image=b.png"] if random.random() < 0.5 else []
                command("run", "graph.json", "--server", self.server.url, *options)
            elif random.random() < 0.08:
                command(
                    "run",
                    "graph.json",
                    "--server",
                    random.choice(
                        (
                            self.server.url + "/x",
                            "http://127.0.0.1:1",
                            "http://[::1",
                            "ftp://x",
                            "http://a:b@x",
                            odd_text(random)[:3000],
                        )
                    ),
                )
            else:
                server = Server(self.server.url, LIMITS)
                run_on_server(
                    server,
                    prepared(Source(GRAPH), ["1.image=b.png"], server.inputs_of, Observer()).graph,
                    Folders(Path("input"), self.output),
                )
        finally:
            self.server.plan = None
            self.check(before)

    def check(self, before: dict[str, tuple[int, int]]) -> None:
        """Asserts that only pictures under plain names have come, inside the output folder."""
        try:
            after = files_below(self.folder)
            assert all(after.get(name) == status for name, status in before.items()), (
                "an earlier file was changed or lost"
            )
            for name in after.keys() - before.keys():
                assert name.startswith("output/"), f"written outside: {name!r}"
                assert name.isprintable(), f"an odd name: {name!r}"
                assert not any(part.startswith(".") for part in name.split("/")), f"a hidden name: {name!r}"
                with Image.open(self.folder / name) as picture:
                    picture.verify()
            assert not (self.folder / "elsewhere.png").exists(), "written through a link"
        finally:
            shutil.rmtree(self.output)

    def plan(self, random: Random) -> Plan:
        """Good answers, of which some are spoiled."""
        images = [
            {
                "filename": random.choice((*NAMES, "a.png", "b.png", odd_text(random)[:400]))
                if random.random() < 0.5
                else "a.png",
                "subfolder": random.choice(FOLDERS) if random.random() < 0.4 else "",
                "type": random.choice(("output", "output", "temp", "input", "x", None, 7))
                if random.random() < 0.2
                else "output",
            }
            for _ in range(random.choice((1, 1, 1, 2, 5, 100)))
        ]
        failure = {
            "node_id": "1",
            "node_type": "X\x1b[31m",
            "exception_type": "E\n",
            "exception_message": random.choice(TEXTS) * 50,
            "traceback": [],
        }
        status = random.choice(
            (
                {"status_str": "success", "completed": True, "messages": []},
                {"status_str": "error", "messages": [["execution_error", failure]]},
            )
        )
        history = {"outputs": {"2": {"images": images}}, "status": status if random.random() < 0.3 else {}}
        refused = {
            "type": "prompt_outputs_failed_validation",
            "message": "m",
            "details": "d",
            "extra_info": {},
        }
        reasons = [{"type": random.choice(("value_not_in_list", "required_input_missing", "x",
            "custom_validation_failed", "return_type_mismatch")), "message": "m",
                    "details": random.choice(TEXTS) * 9, "extra_info": {"input_name": "image",
                    "received_value": random.choice(TEXTS)}}]  # fmt: skip
        errors = {"1": {"errors": reasons, "dependent_outputs": [], "class_type": "LoadImage"}}
        prompt: dict[str, Any] = {
            "prompt_id": "abc",
            "number": 0,
            "node_errors": errors if random.random() < 0.1 else {},
        }
        if random.random() < 0.1:
            prompt = {"error": refused, "node_errors": errors if random.random() < 0.5 else {}}
        running = random.choice(([], [[0, "abc", {}, {}, []]]))
        contents: dict[str, Any] = {
            "object_info": {
                "LoadImage": {
                    "input": {"required": {"image": [["a.png"], {}]}, "optional": {}},
                    "output": ["IMAGE", "MASK"],
                }
            },
            "prompt": prompt,
            "queue": {"queue_running": running, "queue_pending": [[1, "other", {}, {}, []]]},
            "history": {"abc": history},
        }
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            name = random.choice(list(contents))
            spoil(contents[name], random)
            if random.random() < 0.2:
                contents[name] = odd_value(random, 0.7)
        answers = {name: as_json(content, random) for name, content in contents.items()}
        answers["view"] = random.choice(
            (
                *[self.picture] * 6,
                spoiled("PNG", random),
                spoiled("GIF", random),
                b"",
                b"<html>",
                b"#!/bin/sh",
            )
        )
        behaviours = {}
        if random.random() < 0.4:
            behaviours[random.choice(list(answers))] = random.choice(BEHAVIOURS)
        return Plan(random, answers, behaviours)


def as_json(content: Any, random: Random) -> bytes:
    try:
        text = json.dumps(content)
    except (ValueError, RecursionError):
        text = "[" * 100_000
    if random.random() < 0.03:
        text = random.choice(
            (
                text[:-1],
                "",
                "nope",
                "<html>",
                "[" * 200_000,
                "1e999",
                "9" * 10_000,
                "null",
                text + text,
                '{"a":' * 9000,
                "NaN",
            )
        )
    return (
        text.encode("utf-8", "surrogatepass")
        if random.random() < 0.99
        else b"\xff\xfe" + text.encode("utf-16", "surrogatepass")
    )


class Handler(StreamRequestHandler):
    server: HostileServer

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            request = self.rfile.readline(65_536).decode("latin-1").split(" ")
            length = 0
            while (line := self.rfile.readline(65_536)) not in (b"\r\n", b"\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            plan = self.server.plan
            if plan is not None and len(request) > 1:
                self.answer(plan, request[1].strip("/").partition("/")[0].partition("?")[0])

    def answer(self, plan: Plan, name: str) -> None:
        body = plan.answers.get(name, b"{}")
        plan.looks += name == "queue"
        if plan.looks > 4:  # a server that never ends is waited for as long as the user likes
            body = b'{"queue_running": [], "queue_pending": []}'
        refused = name == "prompt" and b'"error"' in body
        head = b"HTTP/1.1 %s\r\nConnection: close\r\n" % (b"400 Bad Request" if refused else b"200 OK")
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        behaviour = plan.behaviours.get(name, "plain")
        if behaviour == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        for part, pause in written(behaviour, head, length, body, self.server.url.encode()):
            self.wfile.write(part)
            time.sleep(pause)


def written(
    behaviour: str, head: bytes, length: bytes, body: bytes, url: bytes
) -> Iterator[tuple[bytes, float]]:
    """What is sent, and how long the server then waits."""
    if behaviour == "drip":
        yield head + length, 0.0
        yield from ((bytes([byte]), 0.2) for byte in body)
    elif behaviour == "drip the header":
        yield from ((bytes([byte]), 0.2) for byte in head)
    elif behaviour == "endless":
        yield head + b"\r\n", 0.0
        yield from ((b" " * 65_536, 0.0) for _ in range(4000))
    elif behaviour == "endless chunks":
        yield head + b"Transfer-Encoding: chunked\r\n\r\n", 0.0
        yield from ((b"10000\r\n" + b" " * 65_536 + b"\r\n", 0.0) for _ in range(4000))
    elif behaviour in ("silent", "late"):
        yield b"", 3.0 if behaviour == "silent" else 0.3
        yield head + length + body, 0.0
    else:
        yield WHOLE[behaviour](head, length, body, url), 0.0


WHOLE: dict[str, Callable[[bytes, bytes, bytes, bytes], bytes]] = {
    "plain": lambda head, length, body, url: head + length + body,
    "cut": lambda head, length, body, url: head + length + body[: len(body) // 2],
    "cut in the header": lambda head, length, body, url: head[:20],
    "bad chunks": lambda head, length, body, url: head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
    "long length": lambda head, length, body, url: head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
    "negative length": lambda head, length, body, url: head + b"Content-Length: -5\r\n\r\n" + body,
    "two lengths": lambda head, length, body, url: head + b"Content-Length: 1\r\n" + length + body,
    "redirect": lambda head, length, body, url: b"HTTP/1.1 302 Found\r\nLocation: " + url + b"/queue\r\n\r\n",
    "redirect to a file": lambda head, length, body, url: b"HTTP/1.1 301 x\r\nLocation: file:///etc/passwd\r\n\r\n",
    "error": lambda head, length, body, url: b"HTTP/1.1 500 \x1b[31mOops\r\nConnection: close\r\n" + length + body,
    "many headers": lambda head, length, body, url: head + b"X-A: b\r\n" * 5000 + length + body,
    "long header": lambda head, length, body, url: head + b"X-A: " + b"b" * 200_000 + b"\r\n" + length + body,
    "no header": lambda head, length, body, url: body,
    "gzip": lambda head, length, body, url: head + b"Content-Encoding: gzip\r\n" + length + body,
    "odd status": lambda head, length, body, url: b"HTTP/9.9 " + b"7" * 5000 + b" x\r\n\r\n" + body,
}  # fmt: skip
BEHAVIOURS = (*WHOLE, "drip", "drip the header", "endless", "endless chunks", "silent", "late", "reset")


class HostileServer(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: Plan | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that go away are part of the cases."""
