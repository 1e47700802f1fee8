"""The training loop, on one accelerator or many: everything random in a step follows from (seed, step, rank) alone.

So a run that was killed and resumed from its last checkpoint gives the same weights, bit for bit, as one that was not.
`accelerate` provides the device, the processes, and the exchange between them; `accelerate launch` runs several
processes as one run.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..accelerators import side_stream
from ..errors import CascadeError, Interrupted
from .determinism import deterministic_kernels
from .ema import EMA
from .log import CURVE, Log, draw_curve
from .optimisers import averages_itself, build_optimiser, learning_rate
from .processes import Processes
from .settings import OutputSettings, TrainSettings
from .shared_state import Targets, read_together, write_together
from .state import STATE, first_not_finite, load_scaler, optimiser_tensors, scaler_tensors, step_of
from .tasks.base import Inputs, State, Task
from .trackers import Trackers

AnyTask = TypeVar("AnyTask", bound=Task)
# A batch on the accelerator, the weight of its mean among those of all processes, and the event after its copies
Prepared = tuple[Inputs, float, "torch.cuda.Event | None"]

PREFETCHED = 3  # batches that are prepared while a step runs
CURVE_SECONDS = 20.0  # between two drawings of the curve
# Loss scaling in fp16: the initial scale, which is halved where gradients overflow, and the number of steps without
# overflow after which it is doubled.
LOSS_SCALE, LOSS_SCALE_STEPS = 2.0**10, 500
MIN_LOSS_SCALE = 2.0**-16  # gradients that overflow even below this are NaN or infinite


class Batches(Protocol):
    """Source of batches: `TrainingData`, or any object that returns the same batch for the same arguments."""

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Any: ...


class LoopSettings(Protocol):
    """The part of `Settings` that the loop reads."""

    @property
    def train(self) -> TrainSettings: ...
    @property
    def output(self) -> OutputSettings: ...
    def as_json(self) -> str: ...


@dataclass(frozen=True)
class TrainingProgress:
    """Reported every `log_every` steps. seconds_left: None while unknown; terms: of the loss, by name.

    validation: the last error on held-out pictures."""

    step: int
    steps: int
    loss: float
    steps_per_second: float
    seconds_left: float | None
    terms: dict[str, float] = field(default_factory=dict)
    validation: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of a run. peak_bytes: of the accelerator's memory, 0 on the CPU; file: written at the end."""

    step: int
    finished: bool
    seconds: float
    peak_bytes: int
    file: Path | None = None


def step_seed(*numbers: int) -> int:
    """A different seed for each combination of numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


class Loop(Generic[AnyTask]):
    """Trains a task to the end of its settings, or until it is stopped.

    report   called with the progress
    stop     called after each batch; True writes a checkpoint and ends the run
    sample   makes a picture (3, H, W) in [0, 1] of a step and a state, every `output.sample_every` steps
    validate gives the error of a state on held-out pictures, every `validation.every` steps
    keep     writes the weights so far, every `output.save_every` steps
    """

    def __init__(
        self,
        task: AnyTask,
        data: Batches,
        settings: LoopSettings,
        processes: Processes,
        report: Callable[[TrainingProgress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
        sample: Callable[[int, State], Tensor] | None = None,
    ):
        self.task, self.data, self.settings, self.processes = task, data, settings, processes
        self.report, self.stop, self.sample = report, stop, sample
        assert settings.output.folder is not None
        self.folder = Path(settings.output.folder)
        self.validate: tuple[int, Callable[[State], float]] | None = None
        self.validated: float | None = None
        self.keep: Callable[[], None] = lambda: None
        self.trackers = Trackers(settings.output.log_with, self.folder, settings.as_json())
        self.contents: dict[str, str] = {}  # of `identity`, stored in the state
        self.show: Callable[[Path], None] = lambda path: None  # called with the file of each curve and sample
        self.step = 0
        if task.shards is None:  # else each process has its own rows of one file
            for value in task.trained.state_dict().values():
                processes.same(value)
        self.optimiser = build_optimiser(task.groups(), settings.train)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        copied = () if task.average_buffers else dict(task.trained.named_buffers())
        ema = 0.0 if averages_itself(self.optimiser) else settings.train.ema
        self.average = EMA(task.trained.state_dict(), ema, copied) if ema else None
        self.scaler = torch.amp.GradScaler(
            task.device.type, LOSS_SCALE, growth_interval=LOSS_SCALE_STEPS, enabled=task.scale_loss
        )

    @property
    def state(self) -> State:
        """The result of the run: the average where one is kept, else the weights themselves."""
        if averages_itself(self.optimiser):
            return self._averaged_by_optimiser()
        return self.average.tensors if self.average else self.task.trained.state_dict()

    @property
    def trained_numbers(self) -> int:
        """Number of trained values, summed over processes where each has its own rows."""
        own = sum(parameter.numel() for parameter in self.parameters)
        return own if self.task.shards is None else sum(self.processes.gather(own))

    @torch.no_grad()
    def _averaged_by_optimiser(self) -> State:
        """A copy of the optimiser's average. The weights are saved and restored, since converting back changes bits."""
        before, optimiser = [parameter.clone() for parameter in self.parameters], cast(Any, self.optimiser)
        optimiser.eval()
        state = {name: value.clone() for name, value in self.task.trained.state_dict().items()}
        optimiser.train()
        for parameter, value in zip(self.parameters, before, strict=True):
            parameter.copy_(value)
        return state

    def run(self) -> Outcome:
        """Trains from the current step on, then writes a checkpoint."""
        train, output = self.settings.train, self.settings.output
        started, first_step, stopped = time.monotonic(), self.step, False
        if self.processes.is_main_process:
            self.log = Log(self.folder, self.step)
        means = _RunningMeans()
        drawn = time.monotonic()
        with deterministic_kernels(train.deterministic), self._prefetching() as next_inputs:
            if output.sample_every and self.step == 0:
                self._sample()
            if self.step == 0:
                self._validate()
            while self.step < train.steps and not stopped:
                terms = self._update(next_inputs)
                if terms is None:
                    break
                means.add(terms)
                if self.step % output.log_every == 0 or self.step == train.steps:
                    self._report(means.take(self.processes.mean), started, first_step)
                    if time.monotonic() - drawn > CURVE_SECONDS:
                        drawn = time.monotonic()
                        self._draw()
                if self._due(output.sample_every):
                    self._sample()
                if self.validate is not None and self._due(self.validate[0]):
                    self._validate()
                if self._due(output.save_every) and self.step < train.steps:
                    self.keep()
                stopped = self._asked_to_stop()
                if self._due(output.checkpoint_every) and self.step < train.steps and not stopped:
                    self.save()
        self.save()
        self._draw()
        self.trackers.close()
        cuda = self.task.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.task.device) if cuda else 0
        return Outcome(self.step, self.step >= train.steps, time.monotonic() - started, peak)

    @contextmanager
    def _prefetching(self) -> Iterator[Callable[[], tuple[Inputs, float]]]:
        """Yields a function that returns the next batch and its weight; a thread prepares the ones after it.

        On CUDA that thread has its own stream: in the step's stream, a copy from main memory would wait for the
        previous step, and the next step for the copy.
        """
        train = self.settings.train
        rank, ranks = self.processes.process_index, self.processes.num_processes
        index, end = self.step * train.accumulate, train.steps * train.accumulate
        pool, pending = ThreadPoolExecutor(1, initializer=self._enter_thread), deque[Future[Prepared]]()
        stream = side_stream(self.task.device) if self.task.device.type == "cuda" else None
        if stream is not None:  # the thread's inputs may still be in the making
            stream.wait_stream(torch.cuda.current_stream(self.task.device))

        @torch.no_grad()
        def prepare(index: int) -> Prepared:
            generator = torch.Generator().manual_seed(step_seed(train.seed, index, rank, 1))
            with torch.cuda.stream(stream):
                batch = self.data.batch(index, train.batch_size, rank, ranks)
                inputs = self.task.prepare(batch, generator)
                weight = getattr(batch, "share", 1.0)
                if stream is None:
                    return inputs, weight, None
                ready = torch.cuda.Event()
                ready.record(stream)
                return inputs, weight, ready

        def next_inputs() -> tuple[Inputs, float]:
            nonlocal index
            while len(pending) <= PREFETCHED and index < end:
                pending.append(pool.submit(prepare, index))
                index += 1
            inputs, weight, ready = pending.popleft().result()
            if ready is not None:
                stream = torch.cuda.current_stream(self.task.device)
                stream.wait_event(ready)
                for tensor in inputs.tensors():
                    tensor.record_stream(stream)  # else its memory could be reused while it is read
            return inputs, weight

        try:
            yield next_inputs
        finally:
            pool.shutdown(cancel_futures=True)

    def _enter_thread(self) -> None:
        if self.task.device.index is not None:  # a new thread starts on the first accelerator
            torch.cuda.set_device(self.task.device)

    def _update(self, next_inputs: Callable[[], tuple[Inputs, float]]) -> dict[str, Tensor] | None:
        """One step of the optimiser. Returns the terms of the loss, on the accelerator.

        None where the run was asked to stop between the batches of the step, which then is not taken.
        """
        train = self.settings.train
        asking = train.accumulate > 1 and self.processes.num_processes == 1
        changing = [*self.task.trained.buffers(), *self.task.buffers().values()] if asking else []
        before = [buffer.clone() for buffer in changing]
        rate = learning_rate(self.step, train)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        total: dict[str, Tensor] = {}
        for part in range(train.accumulate):
            if part and asking and self.stop():
                for buffer, value in zip(changing, before, strict=True):
                    buffer.copy_(value)
                self.optimiser.zero_grad(set_to_none=True)
                return None
            inputs, weight = next_inputs()
            torch.manual_seed(step_seed(train.seed, self.step, part, self.processes.process_index))
            terms = self.task.loss(inputs)
            self.scaler.scale(terms["loss"] * weight / train.accumulate).backward()
            for name, value in terms.items():
                value = value.detach() * weight / train.accumulate
                total[name] = total[name] + value if name in total else value
        self._share_gradients()
        self.scaler.unscale_(self.optimiser)
        if train.max_grad_norm:
            self._clip(train.max_grad_norm)
        self.scaler.step(self.optimiser)  # unless a gradient overflowed
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self._share_statistics()
        if self.average:
            self.average.update(self.task.trained.state_dict(), self.step)
        self.step += 1
        return total

    def _share_gradients(self) -> None:
        if self.task.shards is not None:  # FSDP has reduced them
            self.task.shards.take_gradients()
        else:
            self._share([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def _clip(self, largest: float) -> None:
        """Clips the gradient to a norm. With train.fsdp the result is the same for any number of processes."""
        if not self.settings.train.fsdp:
            nn.utils.clip_grad_norm_(self.parameters, largest)
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # In float64, so that sums over any division among processes round to the same float32.
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
        square = (
            torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.task.device).double()
        )
        if self.task.shards is not None:
            square = self.processes.mean(square) * self.processes.num_processes
        norm = square.sqrt().float()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as in torch
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]

    def _share_statistics(self) -> None:
        """Averages values learned without gradients over all processes: batch norms' statistics, loss weights."""
        changing = [*self.task.trained.buffers()] if self.task.trained.training else []
        self._share([b for b in (*changing, *self.task.buffers().values()) if b.is_floating_point()])

    def _share(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over all processes, in one exchange."""
        if self.processes.num_processes == 1 or not tensors:
            return
        flat = self.processes.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        values = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(tensors, values)  # pyright: ignore[reportPrivateImportUsage]

    def _asked_to_stop(self) -> bool:
        """Whether to stop, the same in all processes. Several compare only when logging, since it makes them wait."""
        if self.processes.num_processes == 1:
            return self.stop()
        if self.step % self.settings.output.log_every:
            return False
        return self.processes.mean(torch.tensor(float(self.stop()), device=self.task.device)).item() > 0

    def _report(self, terms: dict[str, float], started: float, first_step: int) -> None:
        train = self.settings.train
        scale = self.scaler.get_scale()
        if not math.isfinite(terms["loss"]):
            raise CascadeError(
                f"The loss is {terms['loss']} at step {self.step}, so the run has diverged; its state stays as it "
                "was before. Lower train.learning_rate and begin anew with --fresh."
            )
        if scale < MIN_LOSS_SCALE:
            raise CascadeError(
                f"The gradients overflow in fp16 at any scale of the loss, at step {self.step}, so the run has "
                "diverged; its state stays as it was before. Lower train.learning_rate, or set train.precision to "
                "fp32, and begin anew with --fresh."
            )
        if not self.processes.is_main_process:
            return
        if self.scaler.is_enabled():
            terms = {**terms, "loss_scale": scale}
        seconds = time.monotonic() - started
        speed = (self.step - first_step) / seconds
        rate = learning_rate(self.step - 1, train)
        self._log({"learning_rate": rate, **terms}, seconds=round(seconds, 1))
        left = (train.steps - self.step) / speed
        self.report(
            TrainingProgress(self.step, train.steps, terms["loss"], speed, left, terms, self.validated)
        )

    def _due(self, every: int | str) -> bool:
        """Whether an action that happens `every` this many steps is due now; epochs were converted to steps before."""
        return isinstance(every, int) and every > 0 and self.step % every == 0

    def _validate(self) -> None:
        # A network that is divided is run by all of its processes.
        if self.validate is None or not (self.processes.is_main_process or self.task.shards is not None):
            return
        self.validated = self.validate[1](self.state)
        if self.processes.is_main_process:
            self._log({"validation": self.validated})

    def _log(self, values: dict[str, float], **others: float) -> None:
        self.log.add({"step": self.step, **others, **values})
        self.trackers.log(values, self.step)

    def _draw(self) -> None:
        if self.processes.is_main_process:
            draw_curve(self.log.rows, self.settings.train.steps, self.folder / CURVE)
            self.show(self.folder / CURVE)

    def _sample(self) -> None:
        # A network that is divided is run by all of its processes.
        if self.sample is None or not (self.processes.is_main_process or self.task.shards is not None):
            return
        from .samples import write_picture

        try:
            picture = self.sample(self.step, self.state)
        except Interrupted:  # the run is about to end too
            return
        if self.processes.is_main_process:
            path = self.folder / "samples" / f"{self.step:06}.png"
            write_picture(path, picture)
            self.trackers.log_picture(picture, self.step)
            self.show(path)

    def save(self) -> None:
        """Writes everything that resuming needs, whole or not at all. Raises CascadeError for weights that diverged."""
        weights = self.task.trained.state_dict()
        found = self.processes.gather(first_not_finite(weights))  # it may be in one process's rows only
        if name := next(filter(None, found), None):
            raise CascadeError(
                f"{name} holds NaN or infinity after step {self.step}, so the run has diverged; its state stays as it "
                "was before. Lower train.learning_rate and begin anew with --fresh."
            )
        state = {
            "trained": weights,
            "average": self.average.tensors if self.average else {},
            "optimiser": optimiser_tensors(self.optimiser),
            "buffers": self.task.buffers(),
            "scaler": scaler_tensors(self.scaler),
        }
        metadata = {"step": str(self.step), "settings": self.settings.as_json()}
        if self.contents:
            metadata["contents"] = json.dumps(self.contents, sort_keys=True)
        write_together(self.folder, self.processes, state, metadata, divided=self.task.shards is not None)

    def resume(self) -> bool:
        """Loads the checkpoint from the main process's folder; returns whether there is one."""
        average = self.average.tensors if self.average else {}
        targets = Targets(self.task.trained.state_dict(), average, self.task.buffers(), self.optimiser)
        if (shards := self.task.shards) is not None:
            numbers = {id(parameter): shards.rows[name] for name, parameter in shards.parameters.items()}
            targets.rows, targets.of_optimiser = shards.rows, [numbers[id(p)] for p in self.parameters]
            targets.index, targets.parts = self.processes.process_index, self.processes.num_processes
        read = read_together(self.folder, self.processes, targets)
        if read is None:
            return False
        metadata, scaler = read
        load_scaler(self.scaler, scaler, self.folder / STATE)
        self.step = step_of(metadata, self.folder / STATE)
        return True


class _RunningMeans:
    """Running means of the loss terms, kept on the accelerator so that no step waits for them."""

    def __init__(self) -> None:
        self.sums, self.count = dict[str, Tensor](), 0

    def add(self, terms: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, averaged over all processes by `mean`; resets them."""
        values = mean(torch.stack(list(self.sums.values())) / self.count).tolist()
        means = dict(zip(self.sums, values, strict=True))
        self.sums, self.count = {}, 0
        return means
