"""Measurements of one picture from inside the process that makes it.

In ComfyUI this file is a custom node that adds two routes; the process without ComfyUI imports it.

copies  bytes copied from main memory to the card by anything, as reported by the driver to torch's profiler
nodes   seconds of each node, including the card's work, and the functions that its thread was in
"""

import sys
import threading
import time
from collections import defaultdict
from typing import Any

import torch

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
MARK = (1 << 20) + 13  # bytes of a last copy: a trace without it was cut off
SAMPLE_SECONDS = 0.004
LISTED = 16  # functions of a node
BESIDE = "between nodes"


class Copies:
    """Trace of the card's copies and kernels, for benchmarks/copies.py."""

    def __init__(self) -> None:
        activities = torch.profiler.supported_activities()
        if not torch.cuda.is_available() or torch.profiler.ProfilerActivity.CUDA not in activities:
            raise RuntimeError("torch's profiler sees no card here")
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        torch.cuda.synchronize()
        self.profile.start()

    def finish(self, path: str) -> dict[str, Any]:
        torch.cuda.synchronize()
        torch.empty(MARK, dtype=torch.uint8).cuda()
        torch.cuda.synchronize()
        self.profile.stop()
        self.profile.export_chrome_trace(path)
        return {"trace": path}

    def enter(self, node: str | None) -> None:
        pass


class Nodes:
    """Seconds by node and by function, from samples of the executing thread every few milliseconds."""

    def __init__(self) -> None:
        self.node, self.since = BESIDE, time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.inclusive: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.own: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.thread: int | None = None
        self.names: dict[Any, str] = {}
        self.running = True
        self.sampler = threading.Thread(target=self._sample, daemon=True)
        self.sampler.start()

    def enter(self, node: str | None) -> None:
        """Called by the thread that runs nodes, when the next begins; None: the last has ended."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.node] += now - self.since
        self.node, self.since, self.thread = node or BESIDE, now, threading.get_ident()

    def finish(self, path: str) -> dict[str, Any]:
        self.running = False
        self.sampler.join()
        return {
            "nodes": dict(self.seconds),
            "functions": {node: self._functions(node) for node in self.inclusive if node in self.seconds},
        }

    def _functions(self, node: str) -> list[tuple[str, float, float]]:
        """(function, inclusive seconds, own seconds), without functions that merely enclose the node."""
        whole = sum(self.own[node].values())
        told = [
            (name, round(spent, 4), round(self.own[node][name], 4))
            for name, spent in sorted(self.inclusive[node].items(), key=lambda item: -item[1])
            if 0.01 * whole < spent and (spent < 0.97 * whole or self.own[node][name] > 0.01 * whole)
        ]
        return told[:LISTED]

    def _sample(self) -> None:
        before = time.perf_counter()
        while self.running:
            time.sleep(SAMPLE_SECONDS)
            now, frame = time.perf_counter(), sys._current_frames().get(self.thread or 0)
            elapsed, before = now - before, now
            if frame is None:
                continue
            node = self.node
            self.own[node][self._name(frame)] += elapsed
            names = set()
            while frame is not None:
                names.add(self._name(frame))
                frame = frame.f_back
            for name in names:
                self.inclusive[node][name] += elapsed

    def _name(self, frame: Any) -> str:
        """File and function, such as engine/graphs.py capture."""
        code = frame.f_code
        if code not in self.names:
            self.names[code] = f"{'/'.join(code.co_filename.split('/')[-2:])} {code.co_name}"
        return self.names[code]


class Measuring:
    """The measurement that runs, if any."""

    def __init__(self) -> None:
        self.current: Copies | Nodes | None = None

    def start(self, what: str) -> dict[str, Any]:
        try:
            self.current = {"copies": Copies, "nodes": Nodes}[what]()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def finish(self, path: str) -> dict[str, Any]:
        current, self.current = self.current, None
        try:
            return current.finish(path) if current is not None else {}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def enter(self, node: str | None) -> None:
        if self.current is not None:
            self.current.enter(node)


def serve(module: Any) -> None:
    """Adds the routes to ComfyUI's server, and hooks into the execution of nodes."""
    from aiohttp import web  # pyright: ignore[reportMissingImports]

    server, measuring = module.PromptServer.instance, Measuring()
    send = server.send_sync

    def send_sync(event: Any, data: Any, sid: Any = None) -> None:
        if event in ("executing", "execution_start"):
            measuring.enter(data.get("node"))
        send(event, data, sid)

    # Both requests are handled by the same thread, as torch's profiler requires.
    @server.routes.post("/measuring/start")
    async def start(request: Any) -> Any:
        return web.json_response(measuring.start((await request.json())["what"]))

    @server.routes.post("/measuring/finish")
    async def finish(request: Any) -> Any:
        return web.json_response(measuring.finish((await request.json())["path"]))

    server.send_sync = send_sync


if "server" in sys.modules and hasattr(sys.modules["server"], "PromptServer"):
    serve(sys.modules["server"])
