"""Workers on Ray: processes on this machine or a cluster's machines, each with its own card.

They are plain actors, and the driver holds the rows: a killed actor only loses the row under way, and is replaced.
https://docs.ray.io/en/latest/ray-core/actors.html
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ...cascade_core.errors import CascadeError, quoted
from ..signals import STOPPING
from .work import CrewLostError, GraphWorker, Job, Outcome, sentence_of

FAILED_STARTS = 3  # consecutive failed starts of workers that end the batch
_OBJECTS = 512 * 2**20  # bytes of shared memory, for pictures in transit
_PATIENCE = 30.0  # seconds without any worker before the user is told
_LEAST_SHARE = 0.001  # of a card


class RayWorker(GraphWorker):
    """A worker in a process of Ray's."""

    def __init__(
        self,
        input_folder: Path,
        graph_folder: Path,
        memory: str | None,
        folder: str,
        threads: int,
        scratch: str | None,
    ):
        import torch

        with suppress(OSError):  # if the machine has the folder, since model paths may be relative to it
            os.chdir(folder)
        if threads:
            torch.set_num_threads(threads)
        super().__init__(input_folder, graph_folder, memory)
        self.scratch = scratch

    def hello(self) -> str:
        """Label of the machine and card that the worker runs on."""
        return self.label


class RayCrew:
    """Workers as Ray's actors, on a cluster that was started for them or joined."""

    def __init__(
        self,
        workers: int | None,
        gpus_per_worker: float | None,
        address: str | None,
        arguments: tuple[Path, Path, str | None],
        notify: Callable[[str], None],
    ):
        """`arguments`: those of GraphWorker."""
        self.notify = notify
        self.folder: str | None = None
        self.actors: list[Any] = []
        self.ray = self._connect(address)
        try:
            gpus = self._share(gpus_per_worker)
            count = self._count(workers, gpus)
        except BaseException:
            self.close()
            raise
        cores = os.cpu_count() or 1
        threads = max(1, cores // count) if address is None else 0
        options = {"num_gpus": gpus} if gpus else {}
        actor = self.ray.remote(num_cpus=0 if gpus else 1, max_restarts=0, max_task_retries=0, **options)(
            RayWorker
        )
        self.start = partial(actor.remote, *arguments, os.getcwd(), threads, self.folder)
        self.starting: dict[Any, Any] = {}  # by Ray's references to their answers
        self.idle: deque[Any] = deque()
        self.busy: dict[Any, tuple[Any, Job]] = {}
        self.failed_starts = 0
        self.waiting_since: float | None = time.monotonic()
        for _ in range(count):
            self._start_worker()

    def free(self) -> int:
        return len(self.idle)

    def give(self, job: Job) -> None:
        actor = self.idle.popleft()
        self.busy[actor.make.remote(job)] = (actor, job)

    def ended(self, seconds: float) -> list[Outcome]:
        references = [*self.busy, *self.starting]
        ready, _ = self.ray.wait(references, num_returns=1, timeout=seconds) if references else ([], [])
        outcomes = []
        for reference in ready:
            if reference in self.starting:
                self._started(reference)
            else:
                outcomes.append(self._finished(reference))
        self._say_that_none_starts()
        return outcomes

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them."""
        for actor in self.actors:
            with suppress(Exception):  # gone already
                self.ray.kill(actor)
        self.ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start_worker(self) -> None:
        actor = self.start()
        self.actors.append(actor)
        self.starting[actor.hello.remote()] = actor

    def _replace(self, actor: Any) -> None:
        with suppress(Exception):  # gone already
            self.ray.kill(actor)
        self.actors.remove(actor)
        self._start_worker()

    def _started(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= FAILED_STARTS:
                raise CrewLostError(f"Workers cannot start; the last error: {sentence_of(error)}") from error
            self._replace(actor)
        else:
            self.failed_starts, self.waiting_since = 0, None
            self.idle.append(actor)

    def _finished(self, reference: Any) -> Outcome:
        actor, job = self.busy.pop(reference)
        try:
            outcome: Outcome = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            outcome = Outcome(job.name, error=f"its worker is gone ({type(error).__name__}).", lost=True)
        if outcome.lost:
            self._replace(actor)
        else:
            self.idle.append(actor)
        return outcome

    def _say_that_none_starts(self) -> None:
        if self.idle or self.busy:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()
        elif time.monotonic() - self.waiting_since > _PATIENCE:
            self.waiting_since = math.inf
            self.notify("No worker has started yet: the cluster's cards may be in use, or its machines gone.")

    def _connect(self, address: str | None) -> Any:
        """Starts Ray on this machine alone, or joins a cluster; returns the module."""
        if address is not None:
            check_reachable(address)
        prepare(os.environ, alone=address is None)
        try:
            import ray
        except ImportError as error:
            raise CascadeError(
                "--workers and --address need Ray, which is not installed: pip install 'cascade-nodes[cluster]'."
            ) from error
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOPPING)}
        try:
            if address is not None:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                return ray
            self.folder = tempfile.mkdtemp(prefix="cascade-ray-")
            ray.init(
                address="local",  # also where RAY_ADDRESS names a cluster
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECTS,
                _temp_dir=self.folder,
            )
            return ray
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = "on this machine" if address is None else f"at --address {quoted(address)}"
            raise CascadeError(f"Ray cannot be used {where}: {sentence_of(error)}") from error
        finally:
            for number, handler in handlers.items():  # Ray sets its own
                if handler is not None:
                    signal.signal(number, handler)

    def _share(self, given: float | None) -> float:
        """Cards per worker: as given, else one if there are cards."""
        cards = self.ray.cluster_resources().get("GPU", 0)
        if given is None:
            return 1.0 if cards else 0.0
        return given

    def _count(self, workers: int | None, gpus: float) -> int:
        """Number of workers. Raises CascadeError for more than fit, since the others would wait for ever."""
        kind, share = ("GPU", gpus) if gpus else ("CPU", 1.0)
        nodes = [node["Resources"].get(kind, 0) for node in self.ray.nodes() if node["Alive"]]
        room = sum(math.floor(there / share + 1e-6) for there in nodes)
        if workers is None and gpus and room:
            return room
        if workers is None:
            raise CascadeError(
                "There are no GPUs, so --workers is needed: the number of processes that compute."
            )
        if workers > room:
            cards = f"{gpus:g} GPU" if gpus else "one CPU"
            raise CascadeError(f"--workers {workers} with {cards} each do not fit; there is room for {room}.")
        return workers


def check_reachable(address: str) -> None:
    """Raises CascadeError for HOST:PORT where nothing listens: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "//" not in host:
        try:
            socket.create_connection((host.strip("[]"), min(int(port), 65_535)), timeout=10).close()
        except OSError as error:
            raise CascadeError(
                f"Nothing answers at --address {quoted(address)} ({error.strerror or error}); give the address that "
                "`ray start --head` printed."
            ) from error


def prepare(environment: MutableMapping[str, str], alone: bool) -> None:
    """Sets variables that Ray reads at import: no usage statistics; on one machine, loopback only, behind a token."""
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    if alone:
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # despite its name: every port on 127.0.0.1
        environment["RAY_AUTH_MODE"] = "token"  # other users of the machine reach loopback too
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
