"""Maps a function over many items in a pool of threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from os import cpu_count
from typing import TypeVar

from .pictures import PictureError

ASKED_EVERY = 0.3  # seconds

T = TypeVar("T")
R = TypeVar("R")


def thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, cpu_count() or 1))


def map_in_threads(
    work: Callable[[T], R], items: Iterable[T], ahead: int, ask: Callable[[], None] = lambda: None
) -> Iterator[tuple[T, R | PictureError]]:
    """Yields each item with work(item), in order; a damaged picture's error stands in place of its result.

    ahead: number of items submitted before the first result is taken. ask: called at each item and every ASKED_EVERY
    seconds; what it raises ends the work.
    """
    pool = thread_pool()
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                yield _result(*pending.popleft(), ask)
        while pending:
            yield _result(*pending.popleft(), ask)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # without waiting even for running items


def _result(item: T, future: Future[R], ask: Callable[[], None]) -> tuple[T, R | PictureError]:
    ask()
    while not wait([future], ASKED_EVERY).done:
        ask()
    try:
        return item, future.result()
    except PictureError as error:
        return item, error
