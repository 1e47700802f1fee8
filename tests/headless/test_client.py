"""The client against a server on 127.0.0.1 that speaks ComfyUI's API."""

import json
import signal
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.client import Server, run_on_server
from cascade_nodes.headless.folders import Folders
from cascade_nodes.headless.results import Observer
from cascade_nodes.headless.sentences import GraphError
from cascade_nodes.tests.headless.comfyui_server import ComfyUI
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.record_comfyui import node, number, show

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
COPY = {
    "1": node("LoadImage", image="in.png"),
    "2": node("SaveImage", images=["1", 0], filename_prefix="sub/out"),
    "3": node("PreviewImage", images=["1", 0]),
}


@pytest.fixture
def comfyui(tmp_path):
    (tmp_path / "server" / "input").mkdir(parents=True)
    Image.fromarray(PICTURE).save(tmp_path / "server" / "input" / "in.png")
    server = ComfyUI(tmp_path / "server")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "input", tmp_path / "here")


class Listener(Observer):
    def __init__(self):
        self.heard = []

    def status(self, text):
        self.heard.append(text)


def test_pictures_come_back(comfyui, folders):
    listener = Listener()
    result = run_on_server(Server(comfyui.url), COPY, folders, listener)
    saved, preview = (picture.path for picture in result.pictures)
    assert saved == folders.output / "sub" / "out_00001_.png"
    assert preview.parent == folders.output / "temp"
    for path in (saved, preview):
        assert np.array_equal(np.asarray(Image.open(path)), PICTURE)
    assert result.outputs["2"]["images"][0]["filename"] == "out_00001_.png"
    assert [picture.node_id for picture in result.pictures] == ["2", "3"]
    assert listener.heard == [f"{comfyui.url}: running, 0 s"]
    assert comfyui.posts == [("/prompt", {"prompt": COPY})]


def test_a_file_that_is_here_already_is_not_overwritten(comfyui, folders):
    existing_path = folders.output / "sub" / "out_00001_.png"
    existing_path.parent.mkdir(parents=True)
    existing_path.write_bytes(b"mine")
    result = run_on_server(Server(comfyui.url), COPY, folders)
    assert result.pictures[0].path.name == "out_00001__1.png"
    assert existing_path.read_bytes() == b"mine"


def test_the_servers_validation_errors_are_said_as_our_own(comfyui, folders):
    with pytest.raises(GraphError) as caught:
        run_on_server(Server(comfyui.url), number(value=101), folders)
    assert str(caught.value) == "Node 1 (ToyNumber): input 'value' is 101, but it must be between 0 and 100."
    assert caught.value.node_errors["1"]["dependent_outputs"] == ["2"]
    with pytest.raises(GraphError, match="Node 1: there is no node 'Gone'"):
        run_on_server(Server(comfyui.url), {"1": node("Gone")}, folders)


def test_outputs_that_the_server_leaves_out_are_reported(comfyui, folders):
    result = run_on_server(Server(comfyui.url), number(value=1) | {"3": show(["1"])}, folders)
    assert list(result.outputs) == ["2"]
    assert result.node_errors["3"]["errors"][0]["type"] == "bad_linked_input"


def test_a_failure_on_the_server(comfyui, folders):
    path = comfyui.folders.input / "in.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CascadeError) as caught:
        run_on_server(Server(comfyui.url), COPY, folders)
    message = str(caught.value)
    assert message.startswith(f"Node 1 (LoadImage) failed on {comfyui.url} with PictureError: ")
    assert "in.png cannot be read: " in message


def test_a_place_in_the_queue_is_told(comfyui, folders):
    listener = Listener()
    comfyui.started = False
    comfyui.pending["another"] = comfyui.pending["one more"] = None
    server = Server(comfyui.url)
    comfyui.finish_all = lambda: comfyui.pending.clear()
    with pytest.raises(CascadeError, match="lost the graph: it was taken off the queue, or it restarted"):
        run_on_server(server, COPY, folders, listener)
    assert listener.heard[0] == f"{comfyui.url}: waiting behind 2 in the queue, 0 s"


def test_a_server_cannot_write_outside_the_output_folder(comfyui, folders):
    server = Server(comfyui.url)
    for entry in ({"filename": "../a.png"}, {"filename": "a.png", "subfolder": "../.."}):
        status = {"status_str": "success"}
        history = {"outputs": {"2": {"images": [{"type": "output", **entry}]}}, "status": status}
        comfyui._execute = lambda validation, history=history: history
        with pytest.raises(
            CascadeError, match=r"names a picture '.*a.png', which (holds|leads) .*; it was not saved"
        ):
            run_on_server(server, COPY, folders)
    assert not folders.output.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9"])
def test_nobody_there(url, folders):
    with pytest.raises(CascadeError) as caught:
        run_on_server(Server(url), COPY, folders)
    message = str(caught.value)
    assert message.startswith("No ComfyUI answers at http://127.0.0.1:9 (")
    assert message.endswith("refused); start ComfyUI, correct --server, or leave it out to run here.")


@pytest.mark.parametrize(
    "url",
    ["ftp://a", "file:///etc/passwd", "", "http://", "http://a:99999", "a:port", "http://a b", "http://a\x1b[2J",
     "a\0b", "http://[::1", "http://a/?x=1", "http://a/#top", "javascript:alert(1)", "http://" + "a" * 100_000, "http://\udce9",
     "http://a..b", "://a", "http:///queue"],
)  # fmt: skip
def test_not_an_address(url, tmp_path, capsys):
    with pytest.raises(CascadeError, match=r"is not an address like http://127.0.0.1:8188\.$") as caught:
        Server(url)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    arguments = ["run", str(tmp_path / "missing.json"), "--server", url, "--output", str(tmp_path)]
    assert main(arguments) == 1, "before the graph is read"
    assert capsys.readouterr().err == f"error: {caught.value}\n"


@pytest.mark.parametrize("rest", ["127.0.0.1:8188", "127.0.0.1:99999", "[::1", "a/?x=1", "a?x=1", ""])
def test_an_address_with_a_password_is_refused_without_showing_it(rest):
    with pytest.raises(CascadeError, match="holds a user name or a password") as caught:
        Server(f"http://me:secret@{rest}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("127.0.0.1:8188/", "http://127.0.0.1:8188"),
        ("HTTPS://Example.org", "https://example.org"),
        ("http://[::1]:8188", "http://[::1]:8188"),
        ("http://münchen.example/comfy ui/".replace(" ", "%20"), "http://xn--mnchen-3ya.example/comfy%20ui"),
    ],
)
def test_addresses(url, address):
    assert Server(url).url == address


def test_something_else_there(folders):
    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200 if self.path == "/prompt" else 405)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        client = Server(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(CascadeError, match=r"/prompt did not answer with JSON; is it a ComfyUI\?"):
            run_on_server(client, COPY, folders)
        with pytest.raises(CascadeError, match="/other answered 405 Method Not Allowed"):
            client.post("/other", {})
        server.shutdown()


def test_the_command_runs_a_graph_on_a_server(comfyui, tmp_path, capsys):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(COPY))
    arguments = ["run", str(file), "--server", comfyui.url, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--set", "SaveImage.filename_prefix=1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{tmp_path}/out/1_00001_.png  (")
    assert comfyui.posts[0][1]["prompt"]["2"]["inputs"]["filename_prefix"] == "1"
    assert main([*arguments, "--set", "2.prefix=x"]) == 1
    assert capsys.readouterr().err == (
        "error: Node 2 (SaveImage) has no input 'prefix'; its inputs: images, filename_prefix.\n"
    )


def test_the_prefix_is_filled_in_and_checked_before_the_server_works(comfyui, tmp_path, capsys):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(COPY))
    arguments = ["run", str(file), "--server", comfyui.url, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--set", "2.filename_prefix=%date:yyyy%/%LoadImage.image%"]) == 0
    year = f"{time.localtime().tm_year}"
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out/{year}/in.png_00001_.png  (")
    posts = len(comfyui.posts)
    for prefix, fault in {"../out": "leads out of the folder", ".out": "begins with a dot"}.items():
        assert main([*arguments, "--set", f"2.filename_prefix={prefix}"]) == 1
        error = f"error: Node 2 (SaveImage): Cannot save as '{prefix}', which {fault}"
        assert capsys.readouterr().err.startswith(error)
    assert len(comfyui.posts) == posts


def test_ctrl_c_takes_the_graph_off_the_server(comfyui, tmp_path):
    comfyui.patience = 10**9
    (tmp_path / "graph.json").write_text(json.dumps(COPY))
    with start("run", "graph.json", "--server", comfyui.url, cwd=tmp_path) as process:
        while comfyui.looks < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert errors_of(process).read() == "Stopped.\n"
    assert process.returncode == 130
    (prompt_id,) = comfyui.pending
    assert comfyui.posts[1:] == [
        ("/queue", {"delete": [prompt_id]}),
        ("/interrupt", {"prompt_id": prompt_id}),
    ]
