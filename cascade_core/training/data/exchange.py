"""Exchange of cache rows among processes, through a shared folder or by sending."""

from collections.abc import Sequence
from itertools import groupby

import torch

from ...errors import CascadeError
from ..processes import Processes
from .cache import Cache, Key

SENT_AT_ONCE = 256  # rows


def exchange(cache: Cache, keys: Sequence[Key], processes: Processes) -> None:
    """Gives every process all rows that any of them has.

    keys: this process's keys of all rows, in an order that is the same in all processes.
    """
    if processes.num_processes == 1:
        return
    processes.wait()
    cache.read()
    held = processes.gather("".join("01"[key in cache] for key in keys))
    wanted = [i for i, flags in enumerate(zip(*held, strict=True)) if "0" in flags and "1" in flags]
    owners = [next(rank for rank, flags in enumerate(held) if flags[i] == "1") for i in wanted]
    failures: list[CascadeError] = []
    for owner, run in groupby(zip(owners, wanted, strict=True), key=lambda pair: pair[0]):
        indices = [index for _, index in run]
        for start in range(0, len(indices), SENT_AT_ONCE):
            _send(cache, [keys[i] for i in indices[start : start + SENT_AT_ONCE]], owner, processes, failures)

    def read() -> None:
        if failures:
            raise failures[0]
        cache.read()

    processes.wait()  # until all rows are written
    processes.on_each(read)


def _send(
    cache: Cache, keys: Sequence[Key], owner: int, processes: Processes, failures: list[CascadeError]
) -> None:
    """Sends rows of one process to all others. The first process of each machine writes them to its folder.

    failures: collects errors of writing; a process that raised here would keep all others waiting.
    """
    own = processes.process_index == owner
    by_shape: dict[tuple[tuple[int, ...], str], list[int]] = {}
    if own:
        for number, key in enumerate(keys):
            row = cache.rows[key]
            by_shape.setdefault((tuple(row.shape), str(row.dtype)), []).append(number)
    told = [[list(shape), dtype, numbers] for (shape, dtype), numbers in by_shape.items()]
    for shape, dtype, numbers in processes.tell(told, owner):
        of_these = [keys[number] for number in numbers]
        rows = cache.stack(of_these) if own else torch.empty(len(numbers), *shape, dtype=_dtype(dtype))
        processes.spread(rows, owner)
        new = [i for i, key in enumerate(of_these) if key not in cache]
        if new and (cache.folder is None or processes.is_local_main_process):
            try:
                add = cache.add if cache.folder is None else cache.write
                add([of_these[i] for i in new], rows[new])
            except CascadeError as error:
                failures.append(error)


def _dtype(name: str) -> torch.dtype:
    return {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}[name]
