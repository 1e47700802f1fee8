"""Pictures decoded in threads, ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ...errors import CascadeError
from .pictures import PictureError

if TYPE_CHECKING:
    from .bucketing import Placed

HELD = 4_000_000_000  # bytes of pictures that are kept decoded
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
    """The pixels of batches, the next one's decoded while this one is trained on.

    They are kept while there is room, so that a set that fits is decoded once and not in every epoch.
    """

    def __init__(self) -> None:
        self.pool, self.room = threads(), HELD
        self.begun: dict[Placed, Future[Tensor]] = {}
        self.held: dict[Placed, Tensor] = {}

    def begin(self, placed: Sequence[Placed]) -> None:
        """What will be asked for next; what was begun before and not asked for is forgotten."""
        self.begun = {each: self._decode(each) for each in dict.fromkeys(placed) if each not in self.held}

    def images(self, placed: Sequence[Placed], mirrored: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, as the compressor reads them; mirrored: (B,), 1 where to mirror."""
        for each in placed:
            if each not in self.held and each not in self.begun:
                self.begun[each] = self._decode(each)
        images = [self._picture(each) for each in placed]
        return torch.stack(
            [
                image.flip(-1) if turned else image
                for image, turned in zip(images, mirrored.tolist(), strict=True)
            ]
        )

    def _decode(self, placed: Placed) -> Future[Tensor]:
        return self.pool.submit(placed.pixels, placed.bucket.compressor)

    def _picture(self, placed: Placed) -> Tensor:
        if placed in self.held:
            return self.held[placed]
        try:
            image = self.begun[placed].result()
        except PictureError as error:
            raise CascadeError(
                f"The picture {placed.picture.name} could be read as its latent was made, but no longer ({error}); "
                "put it back, or start again without it."
            ) from None
        if image.nbytes <= self.room:
            self.room -= image.nbytes
            self.held[placed] = image
        return image
