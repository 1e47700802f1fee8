"""Programs timed by benchmarks/served.py: a ComfyUI server with a browser, and this project without ComfyUI."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_files import write_network
from served_graphs import FILES, PACK, Graph

PATIENCE = 600  # seconds until a server has started, or a graph is done
HERE = Path(__file__).resolve().parent
CLIENT = "benchmark"
BY_NODE = ("nodes", "functions")  # results of inside_server.py that are by node

# In the measured process, limits the card's reported memory to CARD_GB. Set when torch is imported, because ComfyUI
# chooses its allocator before that.
SMALLER_CARD = """
import builtins, os
_import = builtins.__import__
def _watched(name, *arguments, **options):
    module = _import(name, *arguments, **options)
    if name == "torch" and hasattr(module, "cuda") and hasattr(module.cuda, "mem_get_info"):
        builtins.__import__ = _import
        limit, real = float(os.environ["CARD_GB"]) * 2**30, module.cuda.mem_get_info
        def mem_get_info(*arguments, **options):
            return int(min(real(*arguments, **options)[0], limit)), int(limit)
        module.cuda.mem_get_info = module.cuda.memory.mem_get_info = mem_get_info
    return module
builtins.__import__ = _watched
"""
RUN_COMFYUI = """
import runpy, sys
sys.argv[0] = "main.py"
sys.path.insert(0, ".")
runpy.run_path("main.py", run_name="__main__")
"""
RUN_HEADLESS = """
import runpy, sys
sys.path.insert(0, {folder!r})
runpy.run_path({program!r}, run_name="__main__")
"""
BALLAST = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - {left} * 2**30), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def ballast(left: float | None) -> Iterator[None]:
    """Another process that occupies all of the card's memory except `left` GB."""
    if left is None:
        yield
        return
    program = [sys.executable, "-c", BALLAST.format(left=left)]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "held":
            raise RuntimeError(f"The card's memory could not be taken except for {left:g} GB.")
        yield
    finally:
        process.stdin.close()
        process.wait(20)


class Program:
    """Process that makes pictures of graphs. Its waits end at `deadline`, by time.monotonic()."""

    def __init__(self, base: Path, name: str, memory: float | None, deadline: float):
        self.base, self.deadline = base, deadline
        self.log = base / f"log_{name}.txt"
        self.program = "" if memory is None else SMALLER_CARD
        kernels = base / "kernels" / name
        self.compiled = kernels.is_dir() and any(kernels.iterdir())
        kernels.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels), "PYTHONUNBUFFERED": "1"}
        # CUPTI, which torch's profiler uses, must not be taken down under CUDA graphs.
        self.environment |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
        if memory is not None:
            self.environment["CARD_GB"] = str(memory)

    process: subprocess.Popen[Any]
    picture: Path | None = None  # file of the last one

    def seconds(self, graph: Graph) -> float:
        """Seconds from the start of the graph to its end, as reported by the program."""
        raise NotImplementedError

    def measuring(self, step: str, argument: str) -> dict[str, Any]:
        """Starts ("start", what) or ends ("finish", path) a measurement of inside_server.py."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """Versions, card and allocator."""
        raise NotImplementedError

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def until(self) -> float:
        return min(self.deadline, time.monotonic() + PATIENCE)

    def failure(self, what: str) -> RuntimeError:
        end = self.log.read_text(encoding="utf-8", errors="replace")[-1500:]
        late = " within its time" if self.process.poll() is None else f" ({self.process.returncode})"
        return RuntimeError(f"{what}{late}:\n{end}")


class Server(Program):
    """A ComfyUI with the random files, only this pack, the flags, and a listening browser."""

    def __init__(
        self, checkout: Path, base: Path, name: str, flags: list[str], memory: float | None, deadline: float
    ):
        super().__init__(base, name, memory, deadline)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        python = checkout / ".venv" / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), "-c", self.program + RUN_COMFYUI]
        command += ["--port", str(self.port), "--base-directory", str(base)]
        command += [
            "--front-end-root",
            str(base / "front"),
            "--database-url",
            f"sqlite:///{base / 'comfyui.db'}",
        ]
        command += ["--disable-auto-launch", "--disable-api-nodes", *flags]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=checkout, env=self.environment, stdout=log, stderr=log
            )
        self.browser: Browser | None = None
        self.names: dict[str, str] = {}

    def wait(self) -> None:
        end = self.until()
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/system_stats")
                self.browser = Browser(self.port)
                return
            except OSError:
                time.sleep(0.2)
        raise self.failure("ComfyUI did not start")

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=max(self.until() - time.monotonic(), 1)) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode(errors='replace')[:600]}") from error

    def seconds(self, graph: Graph) -> float:
        self.names = {number: f"{number} ({each['class_type']})" for number, each in graph.items()}
        number = self.get("/prompt", {"prompt": graph, "client_id": CLIENT})["prompt_id"]
        end = self.until()
        assert self.browser is not None
        while not self.browser.ended(number, 1.0):
            if time.monotonic() > end or self.process.poll() is not None:
                raise self.failure("The graph did not end")
        while number not in (history := self.get(f"/history/{number}")):
            time.sleep(0.01)
        status = history[number]["status"]
        if status["status_str"] != "success":
            _, message = status["messages"][-1]
            raise RuntimeError(f"{message.get('node_type')}: {message.get('exception_message', message)}")
        image = history[number]["outputs"]["end"]["images"][0]
        self.picture = self.base / image["type"] / image["subfolder"] / image["filename"]
        times = {kind: message["timestamp"] for kind, message in status["messages"]}
        return (times["execution_success"] - times["execution_start"]) / 1000

    def measuring(self, step: str, argument: str) -> dict[str, Any]:
        answer = self.get(f"/measuring/{step}", {"what" if step == "start" else "path": argument})
        return {
            kind: {self.names.get(name, name): value for name, value in told.items()}
            if kind in BY_NODE
            else told
            for kind, told in answer.items()
        }

    def description(self) -> dict[str, Any]:
        stats = self.get("/system_stats")
        device, _, allocator = stats["devices"][0]["name"].partition(" : ")
        system = stats["system"]
        python = system["python_version"].split()[0]
        return {
            "device": device,
            "allocator": allocator,
            "python": python,
            "torch": system["pytorch_version"],
        }

    def stop(self) -> None:
        if self.browser is not None:
            self.browser.close()
        super().stop()


class Browser:
    """Web socket to a server, as of a browser, to which progress and previews are sent. Records ended prompts."""

    ENDED = re.compile(
        rb'"type": "execution_(?:success|error|interrupted)", "data": \{"prompt_id": "([^"]+)"'
    )
    HANDSHAKE = (
        "GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: Y2FzY2FkZS1ub2RlcyAgIA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(self.HANDSHAKE.format(client=CLIENT).encode())
        self.numbers: set[str] = set()
        self.changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def ended(self, number: str, seconds: float) -> bool:
        """Waits up to `seconds` for the end of the prompt; returns whether it has ended."""
        with self.changed:
            return self.changed.wait_for(lambda: number in self.numbers, seconds)

    def close(self) -> None:
        self.socket.close()

    def _listen(self) -> None:
        tail = b""
        try:
            while received := self.socket.recv(1 << 16):
                tail += received  # messages are unmasked, so their text can be searched
                found = {match.group(1).decode() for match in self.ENDED.finditer(tail)}
                tail = tail[-1024:]
                if found - self.numbers:
                    with self.changed:
                        self.numbers |= found
                        self.changed.notify_all()
        except OSError:
            pass  # closed


class Headless(Program):
    """A warm process without ComfyUI that runs graphs as `cascade run` does."""

    def __init__(self, base: Path, memory: float | None, deadline: float):
        super().__init__(base, "headless", memory, deadline)
        self.environment |= {"CASCADE_MODELS": str(base / "models")}
        program = RUN_HEADLESS.format(folder=str(HERE), program=str(HERE / "served_headless.py"))
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.program + program, str(base / "output")],
                env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
            )  # fmt: skip

    def wait(self) -> None:
        self.about = self._ask("describe", None)

    def seconds(self, graph: Graph) -> float:
        told = self._ask("run", graph)
        self.picture = Path(told["picture"])
        return told["seconds"]

    def measuring(self, step: str, argument: str) -> dict[str, Any]:
        return self._ask(step, argument)

    def description(self) -> dict[str, Any]:
        return self.about

    def _ask(self, what: str, value: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Reading a pipe has no timeout; at the deadline the process is ended, which closes the pipe.
        watch = threading.Timer(max(self.until() - time.monotonic(), 0), self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(json.dumps([what, value]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            watch.cancel()
        if not answer:
            self.process.wait(20)
            raise self.failure("The process without ComfyUI ended")
        told = json.loads(answer)
        if "failure" in told:
            raise RuntimeError(told["failure"])
        return told


def start(
    who: str, checkout: Path | None, base: Path, flags: list[str], memory: float | None, deadline: float
) -> Server | Headless:
    """The program of a row. Raises RuntimeError if it does not start."""
    if who == "headless":
        program: Server | Headless = Headless(base, memory, deadline)
    else:
        assert checkout is not None
        program = Server(checkout, base, version_of(checkout), flags, memory, deadline)
    try:
        program.wait()
    except BaseException:
        program.stop()
        raise
    return program


def version_of(checkout: Path) -> str:
    """The version, such as 0.33.0."""
    return (checkout / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]


def knows(checkout: Path, flags: Iterable[str]) -> bool:
    """Whether this ComfyUI has the flags."""
    known = (checkout / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    return all(f'"{flag}"' in known for flag in flags)


def forget_kernels(base: Path, checkout: Path | None) -> None:
    """Removes all compiled kernels of a checkout's server."""
    assert checkout is not None
    shutil.rmtree(base / "kernels" / version_of(checkout), ignore_errors=True)


def link_pack(base: Path) -> None:
    """Makes a server's folders, with this pack and inside_server.py as the only custom nodes."""
    for folder in ("custom_nodes", "input", "output", "temp", "user", "front"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "front" / "index.html").write_text("<html></html>", encoding="utf-8")
    for name, target in {"cascade-nodes": PACK, "measuring.py": HERE / "inside_server.py"}.items():
        link = base / "custom_nodes" / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def write_files(base: Path, configs: dict[str, Any]) -> None:
    """Writes random weights of the published sizes (the configurations' defaults), or of other sizes."""
    for kind, name in FILES.items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            write_network(unfinished, kind, configs.get(kind, {}), sync=False)
            unfinished.replace(path)
