"""Jobs and outcomes of a batch, the interface of its workers, and the worker that runs graphs in this process."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...cascade_core.errors import CascadeError, excerpt, on_one_line
from ..graph import Graph
from ..results import Observer, Result


@dataclass(frozen=True)
class Job:
    """A row ready to run: its name, its graph, the nodes that save its pictures, and its digest."""

    name: str
    graph: Graph
    savers: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Waiting:
    """A row whose job is made when a worker is free: a graph for each row of a long table would fill the memory."""

    name: str
    job: Callable[[], Job]


@dataclass(frozen=True)
class Picture:
    """A picture as a file's content, and the node that saved it."""

    node_id: str
    suffix: str
    content: bytes


@dataclass(frozen=True)
class Outcome:
    """Result of a job. `lost`: its worker is lost, which may not be the job's fault."""

    name: str
    pictures: tuple[Picture, ...] = ()
    error: str | None = None
    lost: bool = False
    seconds: float = 0.0
    worker: str = ""


class CrewLostError(CascadeError):
    """No worker is left for a batch."""


class Crew(Protocol):
    """Workers of a batch, each on one job at a time."""

    def free(self) -> int:
        """Number of jobs that can be given now."""
        ...

    def give(self, job: Job) -> None:
        """Gives a job to a free worker."""
        ...

    def ended(self, seconds: float) -> list[Outcome]:
        """Waits until at least one job ends, or for `seconds`. Raises CrewLostError when no worker is left."""
        ...

    def close(self) -> None:
        """Ends the work, dropping jobs under way."""
        ...


def pictures_of(job: Job, result: Result) -> tuple[Picture, ...]:
    """The pictures that a run saved (previews excluded), read back. Raises CascadeError where there is none."""
    saved = [picture for picture in result.pictures if picture.node_id in job.savers]
    if not saved:
        raise CascadeError("the graph saved no picture.")
    return tuple(Picture(one.node_id, one.path.suffix, one.path.read_bytes()) for one in saved)


class GraphWorker:
    """Runs graphs in this process. Models stay loaded from job to job."""

    def __init__(
        self, input_folder: Path, graph_folder: Path, memory: str | None, observer: Observer | None = None
    ):
        from ...nodes.hosts.headless.device import compute_device, device_with
        from ..execution import Executor

        self.input_folder, self.graph_folder = input_folder, graph_folder
        self.executor = Executor(observer)
        self.device = device_with(memory) if memory else compute_device()
        self.scratch: str | None = None  # folder of a job's pictures until they are handed over
        self.label = f"{socket.gethostname()}:{os.getpid()}"

    def make(self, job: Job) -> Outcome:
        """Runs a job. Errors are returned as sentences, since not every exception can be sent to another process."""
        from ...nodes.hosts.headless.device import computing_on
        from ..run import run_graph

        started = time.perf_counter()
        try:
            scratch = tempfile.TemporaryDirectory(prefix="cascade-batch-", dir=self.scratch)
            with computing_on(self.device), scratch as folder:
                result = run_graph(
                    job.graph,
                    input_folder=self.input_folder,
                    output_folder=folder,
                    graph_folder=self.graph_folder,
                    executor=self.executor,
                )
                pictures = pictures_of(job, result)
        except Exception as error:
            text, broken = sentence_of(error), _card_is_broken(error)
            return Outcome(job.name, error=text, lost=broken, worker=self.label)
        return Outcome(job.name, pictures, seconds=time.perf_counter() - started, worker=self.label)


def sentence_of(error: Exception) -> str:
    """An error in one line."""
    return excerpt(" ".join(str(error).split()) if isinstance(error, CascadeError) else on_one_line(error))


def _card_is_broken(error: Exception) -> bool:
    """Whether no further kernel will run in this process, such as after an illegal memory access."""
    text = str(error)
    return ("CUDA error" in text or "HIP error" in text) and "out of memory" not in text


class LocalCrew:
    """Crew of this process alone, which does one job after the other."""

    def __init__(self, worker: GraphWorker):
        self.worker = worker
        self.job: Job | None = None

    def free(self) -> int:
        return self.job is None

    def give(self, job: Job) -> None:
        self.job = job

    def ended(self, seconds: float) -> list[Outcome]:
        if self.job is None:
            return []
        outcome = self.worker.make(self.job)
        self.job = None
        if outcome.lost:
            raise CrewLostError(f"{outcome.name}: {outcome.error} The same command goes on in a new process.")
        return [outcome]

    def close(self) -> None:
        self.job = None
