"""Work on many pictures at once, in a pool of threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import TypeVar

from .pictures import PictureError

T = TypeVar("T")
R = TypeVar("R")


def thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, cpu_count() or 1))


def map_in_threads(
    work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R | PictureError]]:
    """Yield each item with work(item), in order; a damaged picture's error stands in place of its result.

    ahead: how many items are submitted before the first result is taken.
    """
    pool = thread_pool()
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(item: T, future: Future[R]) -> tuple[T, R | PictureError]:
    try:
        return item, future.result()
    except PictureError as error:
        return item, error
