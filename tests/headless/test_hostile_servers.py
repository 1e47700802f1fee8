"""What a server may answer that is not a ComfyUI, or means ill: a sentence each, bounded, and nothing odd is saved."""

import io
import json
import signal
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.client import Limits, Server, run_on_server
from cascade_nodes.headless.folders import Folders
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.record_comfyui import node

GRAPH = {"1": node("ToyShow")}
LIMITS = Limits(json_bytes=2**20, picture_bytes=2**20, pictures=5)


def encoded(format="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)).save(stream, format=format)
    return stream.getvalue()


def answer(content, status="200 OK", **headers):
    """A whole HTTP answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}"]
    lines += [
        f"{name.replace('_', '-')}: {value}"
        for name, value in ({"Content_Length": len(body)} | headers).items()
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def finished(*entries, **more):
    """The history of a run whose node 1 saved these pictures."""
    return answer(
        {"p": {"outputs": {"1": {"images": list(entries)}}, "status": {"status_str": "success"}} | more}
    )


def drip(connection, stop):
    """An answer that never ends, a byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not stop.wait(0.02):
        connection.sendall(b"x")


def drip_body(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not stop.wait(0.02):
        connection.sendall(b" ")


def flood(connection, stop):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while not stop.is_set():
        connection.sendall(b" " * 2**16)


def silence(connection, stop):
    stop.wait()


class Hostile:
    """A server of raw answers by the beginning of a path; those not given are a ComfyUI's that has run the graph."""

    def __init__(self):
        self.answers = {
            "/prompt": answer({"prompt_id": "p", "number": 0, "node_errors": {}}),
            "/queue": answer({"queue_running": [], "queue_pending": []}),
            "/history": finished({"filename": "a.png", "subfolder": "", "type": "output"}),
            "/view": answer(encoded()),
        }
        self.stop = threading.Event()
        self.asked = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            try:
                with connection.makefile("rb") as request:
                    path = request.readline().decode().split(" ")[1]
                    headers = dict(line.split(b": ") for line in iter(request.readline, b"\r\n"))
                    request.read(int(headers.get(b"Content-Length", 0)))
                self.asked.append(path)
                chosen = next(content for start, content in self.answers.items() if path.startswith(start))
                if callable(chosen):
                    chosen(connection, self.stop)
                else:
                    connection.sendall(chosen)
            except OSError:
                return

    def close(self):
        self.stop.set()
        self.listener.close()


@pytest.fixture
def hostile():
    server = Hostile()
    yield server
    server.close()


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "input", tmp_path / "output")


def refusal(hostile, folders, limits=LIMITS):
    """The sentence with which a run on this server ends."""
    with pytest.raises(CascadeError) as caught:
        run_on_server(Server(hostile.url, limits), GRAPH, folders)
    message = str(caught.value)
    assert all(line.isprintable() and len(line) < 2000 for line in message.splitlines())
    assert len(message.splitlines()) <= 21
    return message.replace(hostile.url, "URL")


def test_a_good_answer(hostile, folders):
    (picture,) = run_on_server(Server(hostile.url, LIMITS), GRAPH, folders).pictures
    assert picture.path == folders.output / "a.png"
    assert picture.path.read_bytes() == encoded()


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history", "/view"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (flood, "answered with more than 1 MiB"),
        (answer(b" " * 2**21), "answered with more than 1 MiB"),
        (answer(b"{}", Content_Length=10), "broke off after 2 of 10 bytes"),
        (answer(b"", Transfer_Encoding="chunked") + b"5\r\n[", "No ComfyUI answers at URL (IncompleteRead"),
        (answer(b"x", "302 Found", Location="file:///etc/passwd"), "answered 302 Found; no redirection is followed"),
        (answer(b"x", "500 \x1b[2J"), "answered 500 '\\x1b[2J'."),
        (answer(b"x", "404 " + "y" * 1000), "answered 404 "),
        (answer(b'{"error": []}', "400 Bad Request"), "answered 400 Bad Request."),
        (b"hello\x1b[2J\r\n\r\n", "No ComfyUI answers at URL ("),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "No ComfyUI answers at URL (got more than 100 headers)"),
        (b"", "No ComfyUI answers at URL (Remote end closed connection without response)"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_answers_that_are_no_answer(path, content, words, hostile, folders):
    hostile.answers[path] = content
    assert words in refusal(hostile, folders)
    assert not folders.output.exists()


@pytest.mark.parametrize("path", ["/history", "/view"])
@pytest.mark.parametrize("slow", [drip, drip_body, silence])
def test_answers_that_never_end(path, slow, hostile, folders):
    hostile.answers[path] = slow
    limits = Limits(picture_seconds=0.4) if path == "/view" else Limits(json_seconds=0.4)
    assert "did not answer in full within 0 s; try again" in refusal(hostile, folders, limits)
    assert not folders.output.exists()


DEEP = b"[" * 100_000


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history"])
@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        b'{"p":' * 100_000,
        b"",
        b"\xff\xfe",
        b"<html>",
        b"1" * 10_000,
        zlib.compress(b" " * 2**24),
        b"{} {}",
    ],
    ids=range(8),
)
def test_what_is_not_json(path, content, hostile, folders):
    hostile.answers[path] = answer(content)
    said = refusal(hostile, folders)
    assert "did not answer" in said


@pytest.mark.parametrize(
    ("path", "content"),
    [
        *[("/prompt", content) for content in ([], "x", 1, None, {}, {"prompt_id": 1}, {"prompt_id": None})],
        *[
            ("/prompt", {"prompt_id": "p", "node_errors": errors})
            for errors in ([1], "x", {"1": 1}, {"1": {}}, {"1": {"class_type": "A", "errors": 3}},
                           {"1": {"class_type": "A", "errors": [{"type": "value_not_in_list"}]}},
                           {"1": {"class_type": "A", "errors": [{"type": [], "message": {}, "details": 1}]}},
                           {"1": {"class_type": 7, "errors": [{"type": "bad_linked_input", "extra_info": []}]}})
        ],
        *[("/history", content) for content in ([], ["p"], "p", 3, None, {"p": []}, {"p": {}})],
        *[
            ("/history", {"p": {"outputs": outputs}})
            for outputs in (None, 1, [], {"1": []}, {"1": None}, {"1": {"images": 5}}, {"1": {"images": "ab"}},
                            {"1": {"images": [None]}}, {"1": {"images": [{}]}}, {"1": {"images": [{"filename": 3}]}},
                            {"1": {"images": [{"filename": "a.png", "subfolder": ["x"]}]}},
                            {"1": {"images": [{"filename": "a.png", "type": {"x": 1}}]}})
        ],
        *[
            ("/history", {"p": {"outputs": {}, "status": status}})
            for status in ("x", [1], {"status_str": "error", "messages": [1]}, {"status_str": 1, "messages": {"a": 1}},
                           {"status_str": "error", "messages": [["execution_error", {}]]})
        ],
        *[("/queue", content) for content in ([], None, {}, {"queue_running": 1, "queue_pending": []},
                                              {"queue_running": [[1]], "queue_pending": []})],
    ],
)  # fmt: skip
def test_answers_of_another_shape(path, content, hostile, folders):
    if path == "/queue":
        hostile.answers["/history"] = answer({})
    hostile.answers[path] = answer(content)
    assert "did not answer as a ComfyUI does" in refusal(hostile, folders)
    assert not folders.output.exists()


def test_what_a_server_writes_is_cut_and_escaped(hostile, folders):
    long, ansi = "x" * 10**5, "\x1b[2J\r\n"
    error = {"type": ansi, "message": long, "details": ansi, "extra_info": {}}
    hostile.answers["/prompt"] = answer(
        {"error": {"type": "x"}, "node_errors": {ansi: {"class_type": long, "errors": [error]}}}, "400 Bad"
    )
    assert r"\x1b[2J" in refusal(hostile, folders)
    entry = {"class_type": "A", "errors": [error]}
    hostile.answers["/prompt"] = answer(
        {
            "error": error,
            "node_errors": {str(i): entry | {"errors": [error | {"message": "x"}]} for i in range(999)},
        },
        "400 Bad",
    )
    assert "There are more faults; mend these first." in refusal(hostile, folders)
    hostile.answers["/prompt"] = answer({"prompt_id": "p"})
    data = {
        "node_id": ansi,
        "node_type": long,
        "exception_type": ansi,
        "exception_message": ansi * 999 + long,
    }
    hostile.answers["/history"] = finished(
        status={"status_str": "error", "messages": [["execution_error", data]]}
    )
    assert r"Node '\x1b[2J\r\n' ('xxx" in refusal(hostile, folders)


@pytest.mark.parametrize(
    "name",
    [".bashrc", ".png", "..", "../a.png", "/a.png", "a/b.png", "a\\b.png", "C:\\a.png", "\x1b[2J.png", "a\0.png",
     "\udce9.png", "nul.png", "COM1.png", "a.png ", "a.png.", "‮gnp.exe.png", "é" * 150 + ".png", "x" * 300 + ".png",
     "", "a\n.png"],
)  # fmt: skip
def test_names_that_no_picture_is_saved_under(name, hostile, folders):
    hostile.answers["/history"] = finished({"filename": name}, {"filename": "good.png"})
    said = refusal(hostile, folders)
    assert said.startswith("URL names a picture ")
    assert said.endswith("; it was not saved.")
    assert [path.name for path in folders.output.iterdir()] == ["good.png"]
    assert len(hostile.asked) == 4, "it is not asked for either"


@pytest.mark.parametrize(
    "subfolder", ["..", "/tmp", "a/../../b", "\\\\host\\a", "a/.ssh", "a/\x1b", "x" * 300, "linked", "dead"]
)
def test_folders_that_no_picture_is_saved_in(subfolder, hostile, folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folders.output.mkdir()
    (folders.output / "linked").symlink_to(tmp_path / "elsewhere")
    (folders.output / "dead").symlink_to(tmp_path / "not there")
    hostile.answers["/history"] = finished({"filename": "a.png", "subfolder": subfolder})
    assert "it was not saved" in refusal(hostile, folders)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dead", "elsewhere", "linked", "output"]


def test_a_link_under_the_pictures_own_name_is_left_alone(hostile, folders, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    folders.output.mkdir()
    (folders.output / "a.png").symlink_to(tmp_path / "mine")
    (picture,) = run_on_server(Server(hostile.url, LIMITS), GRAPH, folders).pictures
    assert picture.path.name == "a_1.png"
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"#!/bin/sh\nrm -rf ~\n"),
        ("a.png", b""),
        ("a.png", b"\x89PNG\r\n\x1a\n"),
        ("a.png", encoded()[:-20]),
        ("a.png", encoded("JPEG")),
        ("a.sh", encoded()),
        ("a", encoded()),
        ("a.html", b"<script>"),
        ("a.png", encoded()[:29] + b"\xff" * 4 + encoded()[33:]),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"),
        (
            "a.png",
            encoded()[:16] + struct.pack(">II", 10**6, 10**6) + b"\x08\x02\0\0\0"
            + struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">II", 10**6, 10**6) + b"\x08\x02\0\0\0"))
            + encoded()[33:],
        ),
    ],
)  # fmt: skip
def test_only_pictures_are_saved(name, content, hostile, folders):
    hostile.answers["/history"] = finished({"filename": name})
    hostile.answers["/view"] = answer(content)
    assert "it was not saved" in refusal(hostile, folders)
    assert not folders.output.exists()


@pytest.mark.parametrize(
    ("name", "format"), [("a.JPG", "JPEG"), ("a.webp", "WEBP"), ("日本 x.png", "PNG"), ("a.gif", "GIF")]
)
def test_pictures_of_other_kinds_and_names_are_saved(name, format, hostile, folders):
    hostile.answers["/history"] = finished({"filename": name, "subfolder": "deep\\er"})
    hostile.answers["/view"] = answer(encoded(format))
    (picture,) = run_on_server(Server(hostile.url, LIMITS), GRAPH, folders).pictures
    assert picture.path == folders.output / "deep" / "er" / name


def test_a_run_has_a_bounded_number_of_pictures(hostile, folders):
    hostile.answers["/history"] = finished(*[{"filename": "a.png"}] * 7)
    assert refusal(hostile, folders) == "URL names 7 pictures, of which the first 5 were fetched."
    assert len(list(folders.output.iterdir())) == 5


def test_an_id_that_is_a_path_stays_an_id(hostile, folders):
    hostile.answers["/prompt"] = answer({"prompt_id": "../\x1b\ud800 x"})
    assert "lost the graph" in refusal(hostile, folders)
    assert hostile.asked[2] == "/history/..%2F%1B%ED%A0%80%20x"


def test_odd_classes_are_asked_for_by_their_name(hostile):
    hostile.answers["/object_info"] = answer({})
    assert Server(hostile.url, LIMITS).inputs_of("../a\ud800") is None
    assert hostile.asked == ["/object_info/..%2Fa%ED%A0%80"]
    for content in ([], {"A": 1}, {"A": {"input": []}}, {"A": {"input": {"required": {"x": []}}}}):
        hostile.answers["/object_info"] = answer(content)
        with pytest.raises(CascadeError, match="did not answer as a ComfyUI does"):
            Server(hostile.url, LIMITS).inputs_of("A")


def test_ctrl_c_ends_also_where_the_server_no_longer_answers(hostile, tmp_path):
    hostile.answers["/history"] = silence
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    with start("run", "graph.json", "--server", hostile.url, cwd=tmp_path) as process:
        while "/history/p" not in hostile.asked:
            assert process.poll() is None
        hostile.answers["/queue"] = silence
        process.send_signal(signal.SIGINT)
        assert errors_of(process).read() == "Stopped.\n"
    assert process.returncode == 130
    assert hostile.asked[-1] == "/queue"
