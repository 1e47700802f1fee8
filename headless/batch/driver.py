"""The loop that hands out a batch's rows, and alone writes the journal."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...cascade_core.errors import CascadeError
from .journal import Journal
from .progress import BatchProgress
from .work import Crew, CrewLostError, Job, Outcome, Waiting, sentence_of

TRIES = 3  # of a row whose worker is lost, since the row may be what kills workers
_LOOK = 1.0  # seconds between two checks for signals


@dataclass
class Summary:
    """Summary of a batch: names of rows made, (name, sentence) of rows that could not be made, and names of rows left.

    ended_by: why no worker is left for the rest.
    """

    made: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ended_by: str | None = None


class Driver:
    """Gives each free worker one row, so that nothing is lost in a queue, and puts back the rows of lost workers."""

    def __init__(self, rows: Iterable[Waiting], crew: Crew, journal: Journal, progress: BatchProgress):
        self.queue = deque(rows)
        self.crew, self.journal, self.progress = crew, journal, progress
        self.under_way: dict[str, Job] = {}
        self.losses: Counter[str] = Counter()
        self.summary = Summary()
        progress.under_way = self.under_way
        progress.begin(len(self.queue))

    def run(self, signals: list[int]) -> Summary:
        """Works until all rows are done, or until `signals` is not empty and the rows under way are finished."""
        try:
            while self.under_way or (self.queue and not signals):
                while self.queue and self.crew.free() and not signals:
                    self._give(self.queue.popleft().job())
                for outcome in self.crew.ended(_LOOK):
                    self._take(outcome)
                self.progress.say_stopping()
        except CrewLostError as error:
            self.summary.ended_by = str(error)
        finally:
            self.summary.left = [*self.under_way, *(row.name for row in self.queue)]
        return self.summary

    def _give(self, job: Job) -> None:
        """Gives a job to a worker, unless another process has made its row since the rows were checked."""
        try:
            done = self.journal.is_done(job)
        except CascadeError as refusal:
            self._fail(job.name, sentence_of(refusal))
            return
        if done:
            self.summary.made.append(job.name)
            self.progress.row_there(job.name)
            return
        self.under_way[job.name] = job
        self.crew.give(job)

    def _take(self, outcome: Outcome) -> None:
        job = self.under_way.pop(outcome.name)
        error = outcome.error
        if outcome.lost:
            self.losses[job.name] += 1
            if self.losses[job.name] < TRIES:
                self.progress.row_again(job.name, outcome.error or "its worker is gone.")
                self.queue.appendleft(Waiting(job.name, lambda: job))
                return
            error = f"{TRIES} workers were lost with it; the last: {outcome.error}"
        if error is None:
            try:
                paths = self.journal.save(job, outcome)
            except CascadeError as refusal:
                error = sentence_of(refusal)
            else:
                self.summary.made.append(job.name)
                self.progress.row_made(job.name, outcome.seconds, paths)
                return
        self._fail(job.name, error)

    def _fail(self, name: str, error: str) -> None:
        self.journal.fail(name, error)
        self.summary.failed.append((name, error))
        self.progress.row_failed(name, error)
