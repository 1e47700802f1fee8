"""ComfyUI servers that work on a batch, each on one row at a time."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

from ...cascade_core.errors import CascadeError
from ..client import Server, ServerLostError, run_on_server
from ..folders import Folders
from ..results import Observer
from .work import CrewLostError, Job, Outcome, pictures_of, sentence_of

_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # seconds between attempts to reach a lost server


class ServersCrew:
    """Sends rows to servers. A lost server is waited for up to a minute; its row goes to another one."""

    def __init__(self, servers: Iterable[Server], notify: Callable[[str], None]):
        self.idle = deque(servers)
        self.count = len(self.idle)
        self.notify = notify
        self.results: SimpleQueue[tuple[Server | None, Outcome | None]] = SimpleQueue()
        self.closing = Event()
        self.threads: list[Thread] = []

    def free(self) -> int:
        return len(self.idle)

    def give(self, job: Job) -> None:
        self._start(self._work, self.idle.popleft(), job)

    def ended(self, seconds: float) -> list[Outcome]:
        outcomes = []
        while self.count:
            try:
                server, outcome = self.results.get(timeout=0 if outcomes else seconds)
            except Empty:
                return outcomes
            if outcome is not None:
                outcomes.append(outcome)
            if server is not None:
                self.idle.append(server)
                if outcome is None:
                    return outcomes
            elif outcome is None:
                self.count -= 1
        if not outcomes:
            raise CrewLostError(
                "No server is left; start them again, and the same command makes what is missing."
            )
        return outcomes

    def close(self) -> None:
        """Removes the rows under way from the servers."""
        self.closing.set()
        for thread in self.threads:
            thread.join(5.0)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        thread = Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _work(self, server: Server, job: Job) -> None:
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix="cascade-batch-") as folder:
                result = run_on_server(
                    server, job.graph, Folders(output=Path(folder)), _Stopping(self.closing)
                )
                pictures = pictures_of(job, result)
        except KeyboardInterrupt:
            return
        except ServerLostError as error:
            self.results.put((None, Outcome(job.name, error=str(error), lost=True, worker=server.url)))
            self._start(self._wait_for, server)
        except Exception as error:
            self.results.put((server, Outcome(job.name, error=sentence_of(error), worker=server.url)))
        else:
            seconds = time.perf_counter() - started
            self.results.put((server, Outcome(job.name, pictures, seconds=seconds, worker=server.url)))

    def _wait_for(self, server: Server) -> None:
        """Waits until a lost server answers again, and returns it to the crew, or gives it up."""
        for pause in _PAUSES:
            if self.closing.wait(pause):
                return
            try:
                server.get("/queue")
            except CascadeError:
                continue
            self.results.put((server, None))
            return
        self.notify(f"{server.url} does not answer any more; the batch goes on without it.")
        self.results.put((None, None))


class _Stopping(Observer):
    """Observer that interrupts the wait for a graph once the batch is closed, which removes it from the server."""

    def __init__(self, closing: Event):
        self.closing = closing

    def status(self, text: str) -> None:
        if self.closing.is_set():
            raise KeyboardInterrupt
