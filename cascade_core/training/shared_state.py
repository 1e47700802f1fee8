"""A run's state, written and read by its processes together, on one machine or several.

The main process writes `state.safetensors`. For a network divided among the processes, each writes its own rows
beside it, `state.ID.0-of-2.safetensors`. All parts are complete before the state names them, so a run that is killed
meanwhile keeps the previous state. Any number of processes can read either form: a part is sent to processes that do
not see its file.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.files import FLOATING
from ..errors import CascadeError, counted, quoted
from .processes import Processes
from .state import ANEW, GROUP, PARTS, STATE, load_optimiser, read_state, rows_of, step_of, write_state

State = dict[str, dict[str, Tensor]]  # by part (of PARTS) and name
DIVIDED = ("trained", "average")  # divided into rows of each process, as is most of the optimiser's state
MAX_PARTS = 65_536
_DTYPES = {
    str(dtype): dtype
    for dtype in (*FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
}


def part_name(run: str, index: int | str, count: int | str) -> str:
    return f"{Path(STATE).stem}.{run}.{index}-of-{count}.safetensors"


def write_together(
    folder: Path, processes: Processes, state: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str],
    divided: bool,
) -> None:  # fmt: skip
    """Writes a state. divided: whether each process has its own rows. Raises CascadeError, the same in all."""
    metadata, keep = dict(metadata), set[str]()
    if divided:
        count, mark = processes.num_processes, processes.tell(secrets.token_hex(8))
        own = {part: {n: v for n, v in state[part].items() if _is_own(part, n, v)} for part in PARTS}
        state = {part: {n: v for n, v in state[part].items() if n not in own[part]} for part in PARTS}
        name = part_name(mark, processes.process_index, count)
        try:
            processes.on_each(lambda: write_state(folder / name, own, {"step": metadata["step"], "id": mark}))
        except CascadeError:  # no state will name what of it was written
            (folder / name).unlink(missing_ok=True)
            raise
        metadata |= {"parts": str(count), "id": mark}
        keep = {part_name(mark, index, count) for index in range(count)}
    processes.on_main(lambda: write_state(folder / STATE, state, metadata))
    if processes.is_local_main_process:
        remove_parts(folder, keep)


def remove_parts(folder: Path, keep: Collection[str] = ()) -> None:
    """Removes the parts of earlier states."""
    for path in folder.glob(part_name("*", "*", "*")):
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _is_own(part: str, name: str, value: Tensor) -> bool:
    return part in DIVIDED or (part == "optimiser" and value.ndim > 0 and not name.startswith(GROUP))


@dataclass
class Targets:
    """Destination of a state: tensors of this process, which hold the rows of part `index` of `parts`.

    average      empty where the run keeps none
    rows         number of rows of each whole tensor of `trained`, where it is divided
    of_optimiser the same for each of the optimiser's parameters, by number
    """

    trained: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimiser: torch.optim.Optimizer
    rows: Mapping[str, int] = field(default_factory=dict)
    of_optimiser: list[int] = field(default_factory=list)
    index: int = 0
    parts: int = 1


def read_together(
    folder: Path, processes: Processes, targets: Targets
) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Fills the targets; returns (metadata, the scaler's tensors), the same in all processes, or None without a state.

    The main process's folder decides. Raises CascadeError, the same in all, for a state that does not fit.
    """
    path, state = folder / STATE, State()

    def read() -> dict[str, str] | None:
        if not path.exists():
            return None
        parts, metadata = read_state(path)
        step_of(metadata, path)
        state.update(parts)
        return metadata

    metadata = processes.on_main(read)
    if metadata is None:
        elsewhere = [index for index, there in enumerate(processes.gather(path.exists())) if there]
        if elsewhere:
            raise CascadeError(
                f"Process 0 has no {path}, but process {elsewhere[0]} has its own, of a run in which its machine was "
                "the first; let it be the first again, copy the file, or begin anew with --fresh."
            )
        return None
    filling = _Filling(targets, path)
    count, scaler = _count_of(metadata, path), dict[str, Tensor]()
    for part, name, value in _told(processes, 0, state):
        if part == "scaler":
            scaler[name] = value
        else:
            filling.place(part, name, value, (0, 1))
    if count is not None:
        _read_parts(folder, processes, filling, metadata.get("id", ""), count)
    processes.on_each(filling.finish)
    return metadata, scaler


def _count_of(metadata: Mapping[str, str], path: Path) -> int | None:
    text = metadata.get("parts")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 0 < int(text) <= MAX_PARTS):
        raise CascadeError(f"{path} states {quoted(text)} as the number of its parts; {ANEW}")
    return int(text)


def _read_parts(folder: Path, processes: Processes, filling: _Filling, mark: str, count: int) -> None:
    """Reads the parts that this process needs or has to send."""
    if not (mark.isascii() and mark.isalnum() and len(mark) <= 64):
        raise CascadeError(f"{folder / STATE} states {quoted(mark)} as the name of its parts; {ANEW}")
    names = [part_name(mark, index, count) for index in range(count)]
    targets = filling.targets
    as_before = targets.parts == count  # each process then needs only its own part
    seen = processes.gather([(folder / name).is_file() for name in names])
    needed = processes.gather([not as_before or index == targets.index for index in range(count)])
    sources = _sources(folder, names, seen, needed)
    own = processes.process_index

    def open_parts() -> dict[int, State]:
        mine = {i for i in range(count) if needed[own][i] and i not in sources}
        return {i: _part(folder / names[i], mark) for i in mine | {i for i, p in sources.items() if p == own}}

    opened: dict[int, State] = {}
    processes.on_each(lambda: opened.update(open_parts()))
    for index in range(count):
        if index in sources:
            for part, name, value in _told(processes, sources[index], opened.get(index, State())):
                if needed[own][index]:
                    filling.place(part, name, value, (index, count))
        elif index in opened:
            for part, values in opened[index].items():
                for name, value in values.items():
                    filling.place(part, name, value, (index, count))


def _sources(
    folder: Path, names: list[str], seen: list[list[bool]], needed: list[list[bool]]
) -> dict[int, int]:
    """{index of a part that some process needs and does not see: the process that sends it}."""
    sources = {}
    for index, name in enumerate(names):
        if any(need[index] and not see[index] for need, see in zip(needed, seen, strict=True)):
            sources[index] = next((process for process, see in enumerate(seen) if see[index]), None)
            if sources[index] is None:
                raise CascadeError(
                    f"{folder / STATE} is in {len(names)} parts, of which {name} is in no process's {folder}; copy it "
                    "from where it was written, or begin anew with --fresh."
                )
    return sources


def _part(path: Path, mark: str) -> State:
    state, metadata = read_state(path)
    if metadata.get("id") != mark:
        raise CascadeError(f"{path} is not a part of the state beside it; {ANEW}")
    return state


def _told(processes: Processes, source: int, state: State) -> Iterator[tuple[str, str, Tensor]]:
    """Yields, in all processes, the tensors (part, name, values) of one process's state."""
    entries = [
        [part, name, str(value.dtype), list(value.shape)]
        for part, values in state.items()
        for name, value in values.items()
    ]
    for part, name, dtype, shape in processes.tell(entries, source):
        if processes.process_index == source:
            value = state[part][name].contiguous()
        else:
            value = torch.empty(shape, dtype=_DTYPES[dtype])
        processes.spread(value, source)
        yield part, name, value


class _Filling:
    """Tensors that are filled with rows as these arrive. Faults are kept until the end, which all reach together."""

    def __init__(self, targets: Targets, path: Path):
        self.targets, self.path = targets, path
        self.tensors = {part: getattr(targets, part) for part in ("trained", "average", "buffers")}
        self.missing = {(p, n): _height(v) for p, values in self.tensors.items() for n, v in values.items()}
        self.differing: set[str] = set()
        self.parameters: list[nn.Parameter] = [
            parameter for group in targets.optimiser.param_groups for parameter in group["params"]
        ]
        self.optimiser: dict[str, Tensor] = {}
        self.lacking: dict[str, int] = {}  # rows of the optimiser's tensors still missing
        self.fault: str | None = None
        self.has_average = False

    @torch.no_grad()
    def place(self, part: str, name: str, value: Tensor, origin: tuple[int, int]) -> None:
        """Copies those rows of a tensor that belong to this process. origin: (index, parts) of the rows received."""
        if part == "optimiser":
            self._place_in_optimiser(name, value, origin)
            return
        if value.is_floating_point() and not value.isfinite().all():
            self.fault = self.fault or f"holds NaN or infinity in {quoted(f'{part}.{name}')}"
        if part == "average":
            self.has_average = True
            if not self.targets.average:
                return
        target = self.tensors[part].get(name)
        rows = self.targets.rows.get(name) if part in DIVIDED else None
        copied = None if target is None else self._copy(target, rows, value, origin)
        if copied is None:
            self.differing.add(name)
        else:
            self.missing[part, name] -= copied

    def _copy(self, target: Tensor, rows: int | None, value: Tensor, origin: tuple[int, int]) -> int | None:
        """Copies the rows that two parts of a tensor share; returns their number, or None for another shape."""
        if rows is None and origin == (0, 1):
            if target.shape != value.shape:
                return None
            target.copy_(value)
            return _height(target)
        if not (target.ndim and value.ndim):
            return None
        whole = target.shape[0] if rows is None else rows
        start, end = rows_of(whole, *origin)
        first, last = (0, whole) if rows is None else rows_of(whole, self.targets.index, self.targets.parts)
        if value.shape != (end - start, *target.shape[1:]):
            return None
        low, high = max(start, first), min(end, last)
        if low < high:
            target[low - first : high - first].copy_(value[low - start : high - start])
        return max(high - low, 0)

    def _place_in_optimiser(self, name: str, value: Tensor, origin: tuple[int, int]) -> None:
        index = name.partition(".")[0]
        known = (
            index.isascii() and index.isdecimal() and len(index) < 10 and int(index) < len(self.parameters)
        )
        if known and not self.parameters[int(index)].numel():
            return  # it has no rows of this process
        if value.ndim and known:
            parameter = self.parameters[int(index)]
            rows = self.targets.of_optimiser[int(index)] if self.targets.of_optimiser else None
            target = self.optimiser.get(name)
            if target is None:
                target = torch.empty_like(parameter, dtype=value.dtype)
            copied = self._copy(target, rows, value, origin)
            if copied is not None:
                self.optimiser[name] = target
                self.lacking[name] = self.lacking.get(name, _height(target)) - copied
                return
            if origin != (self.targets.index, self.targets.parts):
                self.fault = self.fault or (
                    f"was written by {origin[1]} processes with an optimiser whose state cannot be divided anew, as "
                    f"those of 8 bits; go on with {origin[1]}"
                )
        self.optimiser[name] = value.clone()

    def finish(self) -> None:
        """Restores the optimiser. Raises CascadeError for a fault in the received tensors."""
        if self.fault is not None:
            raise CascadeError(f"{self.path} {self.fault}; {ANEW}")
        if self.targets.average and not self.has_average:
            # A state without an average starts one from its weights.
            with torch.no_grad():
                for name, value in self.targets.average.items():
                    value.copy_(self.targets.trained[name])
                    self.missing["average", name] = 0
        differing = sorted(self.differing | {name for (_, name), rows in self.missing.items() if rows})
        if differing:
            raise CascadeError(
                f"{self.path} was written with other settings of what is trained (it differs in "
                f"{counted(len(differing), 'tensor')}, such as {quoted(differing[0])}); put the settings back, or "
                "begin anew with --fresh."
            )
        if lacking := sorted(name for name, rows in self.lacking.items() if rows):
            raise CascadeError(f"{self.path} lacks rows of {quoted(f'optimiser.{lacking[0]}')}; {ANEW}")
        load_optimiser(self.targets.optimiser, self.optimiser, self.path, copy=False)


def _height(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1
