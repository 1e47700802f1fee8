"""Pictures -> Stage C latents by the semantic compressor, each made once and kept."""

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import CascadeError
from .buckets import Bucket, nearest
from .cache import Cache, Key, key_of
from .pictures import DamagedPictureError, picture_size, read_picture
from .sources import Picture, Skipped

HEADER = 65_536  # bytes; most pictures say their size within them
ENCODED_AT_ONCE = 16 * 768 * 768  # pixels
FILE_BYTES = 32_000_000  # of latents in a file of the cache
FILE_SECONDS = 30.0  # or as many as come in this time: what a killed run has to make again

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture in its bucket."""

    picture: Picture
    bucket: Bucket

    def key(self, mirrored: bool) -> Key:
        return key_of(self.picture.identity, *self.bucket, mirrored)

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """uint8 (3, *size)"""
        try:
            data = self.picture.read()
        except OSError as error:
            raise DamagedPictureError(error.strerror or str(error)) from None
        return read_picture(data, self.bucket, size)


def in_threads(
    work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[tuple[T, R | DamagedPictureError]]:
    """Each item with work(item), in order, some done ahead; a damaged picture's error in place of the result."""
    pool = ThreadPoolExecutor(min(16, cpu_count() or 1))
    pending: deque = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(item, future):
    try:
        return item, future.result()
    except DamagedPictureError as error:
        return item, error


def place(
    pictures: Sequence[Picture], sizes: Sequence[Bucket], known: Cache
) -> tuple[list[Placed], list[Skipped]]:
    """Each picture's bucket. known: sizes in pixels that were read before, (2,) int32 by picture."""
    keys = [key_of(picture.identity) for picture in pictures]
    new = [(key, picture) for key, picture in zip(keys, pictures, strict=True) if key not in known]
    skipped, read = [], {}
    for (key, picture), size in in_threads(lambda item: _size(item[1]), new, ahead=1000):
        if isinstance(size, DamagedPictureError):
            skipped.append(Skipped(picture.name, str(size)))
        else:
            read[key] = size
    if read:
        known.add(list(read), torch.tensor(list(read.values()), dtype=torch.int32))
    placed = [
        Placed(picture, nearest(sizes, *known.rows[key].tolist()))
        for key, picture in zip(keys, pictures, strict=True)
        if key in known
    ]
    return placed, skipped


def _size(picture: Picture) -> tuple[int, int]:
    try:
        try:
            return picture_size(io.BytesIO(picture.read(HEADER)))
        except DamagedPictureError:
            if picture.length <= HEADER:
                raise
            return picture_size(io.BytesIO(picture.read()))
    except OSError as error:
        raise DamagedPictureError(error.strerror or str(error)) from None


class Encoder:
    """Fills a cache with latents."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        cache: Cache,
        flip: bool,
        report: Callable[[int, int], None] | None = None,
    ):
        self.encode, self.cache, self.report = encode, cache, report
        self.variants = (False, True) if flip else (False,)
        self.done = self.total = 0

    def fill(self, placed: Sequence[Placed]) -> list[Skipped]:
        """Makes the latents that are not there yet; gives the pictures that turn out to be damaged."""
        missing: dict[Bucket, list[Placed]] = {}
        for each in placed:
            if not all(each.key(mirrored) in self.cache for mirrored in self.variants):
                missing.setdefault(each.bucket, []).append(each)
        self.done, self.total = 0, sum(map(len, missing.values()))
        return [
            skipped for bucket in sorted(missing) for skipped in self._fill_bucket(bucket, missing[bucket])
        ]

    def _fill_bucket(self, bucket: Bucket, placed: list[Placed]) -> list[Skipped]:
        size = bucket.compressor
        at_once = max(ENCODED_AT_ONCE // (size[0] * size[1]), 1)
        skipped: list[Skipped] = []
        keys: list[Key] = []
        images: list[Tensor] = []
        file = _File(self.cache)
        for each, pixels in in_threads(lambda each: each.pixels(size), placed, ahead=2 * at_once):
            if isinstance(pixels, DamagedPictureError):
                skipped.append(Skipped(each.picture.name, str(pixels)))
            else:
                for mirrored in self.variants:
                    if (key := each.key(mirrored)) not in self.cache:
                        keys.append(key)
                        images.append(pixels.flip(-1) if mirrored else pixels)
            self.done += 1
            if len(images) >= at_once:
                file.add(keys, self._encoded(images, bucket))
                keys, images = [], []
                if self.report is not None:
                    self.report(self.done, self.total)
        if images:
            file.add(keys, self._encoded(images, bucket))
        file.close()
        if self.report is not None:
            self.report(self.done, self.total)
        return skipped

    @torch.no_grad()
    def _encoded(self, images: list[Tensor], bucket: Bucket) -> Tensor:
        latents = self.encode(torch.stack(images).float() / 255).float().cpu()
        if latents.shape[0] != len(images) or latents.shape[-2:] != bucket.latent:
            raise CascadeError(
                f"The compressor made latents of shape {tuple(latents.shape)} from {len(images)} pictures of {bucket}; "
                f"expected {(len(images), 16, *bucket.latent)}. Is it the semantic compressor?"
            )
        if not latents.isfinite().all():
            raise CascadeError(
                "The compressor's latents hold NaN or infinity; run it in float32, or use another file."
            )
        return latents


class _File:
    """Rows gathered until they are worth a file."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.keys: list[Key] = []
        self.rows: list[Tensor] = []
        self.bytes, self.began = 0, time.monotonic()

    def add(self, keys: list[Key], rows: Tensor) -> None:
        self.keys += keys
        self.rows.append(rows)
        self.bytes += rows.nbytes
        if self.bytes >= FILE_BYTES or time.monotonic() - self.began >= FILE_SECONDS:
            self.close()

    def close(self) -> None:
        if self.rows:
            self.cache.add(self.keys, torch.cat(self.rows))
        self.keys, self.rows, self.bytes, self.began = [], [], 0, time.monotonic()
