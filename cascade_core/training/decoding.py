"""Pictures decoded in threads, ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..errors import CascadeError
from .pictures import PictureError

if TYPE_CHECKING:
    from .placing import Placed

T = TypeVar("T")
R = TypeVar("R")


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, cpu_count() or 1))


def in_threads(
    work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R | PictureError]]:
    """Each item with work(item), in order, `ahead` of them begun before; a bad picture's error for its result."""
    pool = threads()
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                yield _finished(*pending.popleft())
        while pending:
            yield _finished(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(item: T, future: Future[R]) -> tuple[T, R | PictureError]:
    try:
        return item, future.result()
    except PictureError as error:
        return item, error


class Decoder:
    """The pixels of batches, the next one's decoded while this one is trained on."""

    def __init__(self) -> None:
        self.pool = threads()
        self.begun: dict[Placed, Future[Tensor]] = {}

    def begin(self, placed: Sequence[Placed]) -> None:
        """What will be asked for next; what was begun before and not asked for is forgotten."""
        self.begun = {
            each: self.pool.submit(each.pixels, each.bucket.compressor) for each in dict.fromkeys(placed)
        }

    def images(self, placed: Sequence[Placed], mirrored: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1], as the compressor reads them; mirrored: (B,), 1 where to mirror."""
        futures = [
            self.begun.get(each) or self.pool.submit(each.pixels, each.bucket.compressor) for each in placed
        ]
        images = []
        for each, future, turned in zip(placed, futures, mirrored.tolist(), strict=True):
            try:
                image = future.result()
            except PictureError as error:
                raise CascadeError(
                    f"The picture {each.picture.name} could be read as its latent was made, but no longer ({error}); "
                    "put it back, or start again without it."
                ) from None
            images.append(image.flip(-1) if turned else image)
        return torch.stack(images).float() / 255
