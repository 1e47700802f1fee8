"""Pictures -> Stage C latents by the semantic compressor, each made once and kept."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import CascadeError
from .bucketing import Placed
from .buckets import Bucket
from .cache import Cache, Key
from .decoding import in_threads
from .pictures import PictureError

ENCODED_AT_ONCE = 16 * 768 * 768  # pixels
FILE_BYTES = 32_000_000  # of latents in a file of the cache
FILE_SECONDS = 30.0  # or as many as come in this time: what a killed run has to make again


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

    def fill(self, placed: Sequence[Placed]) -> dict[Placed, str]:
        """Makes the latents that are not there yet; gives the pictures that turn out to be damaged, and how."""
        missing: dict[Bucket, list[Placed]] = {}
        for each in placed:
            if not all(each.key(mirrored) in self.cache for mirrored in self.variants):
                missing.setdefault(each.bucket, []).append(each)
        self.done, self.total = 0, sum(map(len, missing.values()))
        damaged: dict[Placed, str] = {}
        for bucket in sorted(missing):
            file = _File(self.cache)
            try:
                damaged |= self._fill_bucket(bucket, missing[bucket], file)
            finally:  # interrupted: what was made is kept
                file.close()
        return damaged

    def _fill_bucket(self, bucket: Bucket, placed: list[Placed], file: "_File") -> dict[Placed, str]:
        size = bucket.compressor
        at_once = max(ENCODED_AT_ONCE // (size[0] * size[1]), 1)
        damaged: dict[Placed, str] = {}
        keys: list[Key] = []
        images: list[Tensor] = []
        for each, pixels in in_threads(lambda each: each.pixels(size), placed, ahead=2 * at_once):
            self.done += 1
            if isinstance(pixels, PictureError):
                damaged[each] = str(pixels)
            else:
                for mirrored in self.variants:
                    if (key := each.key(mirrored)) not in self.cache:
                        keys.append(key)
                        images.append(pixels.flip(-1) if mirrored else pixels)
            if images and (len(images) >= at_once or each is placed[-1]):
                file.add(keys, self._encoded(images, bucket))
                keys, images = [], []
                if self.report is not None:
                    self.report(self.done, self.total)
        return damaged

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
