"""Latents of pictures, by the semantic compressor or another encoder, each encoded once and cached."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CascadeError, counted
from ...geometry import LATENT_CHANNELS
from ..processes import Processes
from .bucketing import CENTRES, BucketedPicture, Crops
from .buckets import Bucket
from .cache import Cache, Key
from .exchange import exchange
from .pictures import PictureError
from .threads import map_in_threads

ENCODED_AT_ONCE = 16 * 768 * 768  # pixels
FILE_BYTES = 32_000_000  # of latents in a file of the cache
FILE_SECONDS = 30.0  # or as many as are encoded in this time, the most that a killed run loses


class LatentForm(NamedTuple):
    """Shape of an encoder's input and output for a bucket: pixels, channels and positions."""

    network: str
    channels: int
    pixels: Callable[[Bucket], tuple[int, int]]
    positions: Callable[[Bucket], tuple[int, int]]

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        return self.channels, *self.positions(bucket)


STAGE_C_LATENTS = LatentForm(
    "semantic compressor",
    LATENT_CHANNELS["stage_c"],
    lambda bucket: bucket.compressor,
    lambda bucket: bucket.latent,
)


class LatentEncoder:
    """Fills a cache with latents.

    encode: (B, 3, H, W) float32 in [0, 1] -> (B, C, h, w); flip: mirrored pictures as well; crops: parts of each
    picture; form: shapes of input and output; report: called with the number of pictures encoded so far and in total;
    ask: called for each picture, raises Interrupted to end the run.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        cache: Cache,
        flip: bool,
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
        crops: Crops = CENTRES,
        form: LatentForm = STAGE_C_LATENTS,
    ):
        self.encode, self.cache, self.report, self.ask, self.crops = encode, cache, report, ask, crops
        self.form = form
        self.mirrorings = (False, True) if flip else (False,)
        self.done = self.total = 0

    @property
    def variants(self) -> int:
        """Number of latents of a picture."""
        return self.crops.count * len(self.mirrorings)

    def keys(self, picture: BucketedPicture) -> list[Key]:
        """The keys of all latents of a picture: for each crop, unmirrored and then mirrored."""
        crops = self.crops.all_of(picture)
        return [picture.key(mirrored, crop) for crop in crops for mirrored in self.mirrorings]

    def fill_together(self, pictures: Sequence[BucketedPicture], processes: Processes) -> None:
        """`fill` by several processes, each of which encodes its share and receives the others'."""
        rank, ranks = processes.process_index, processes.num_processes
        processes.on_each(lambda: self.fill(pictures[rank::ranks]))
        exchange(self.cache, [key for each in pictures for key in self.keys(each)], processes)

    def fill(self, pictures: Sequence[BucketedPicture]) -> dict[BucketedPicture, str]:
        """Encodes the latents that are not cached yet; returns the damaged pictures, and what is wrong with each."""
        missing: dict[Bucket, list[BucketedPicture]] = {}
        for picture in pictures:
            keys = self.keys(picture)
            for key in keys:
                self.cache.keep(key, self.form.shape(picture.bucket), torch.float32)
            if not all(key in self.cache for key in keys):
                missing.setdefault(picture.bucket, []).append(picture)
        self.done, self.total = 0, self.crops.count * sum(map(len, missing.values()))
        damaged: dict[BucketedPicture, str] = {}
        for bucket in sorted(missing):
            file = _CacheFile(self.cache)
            try:
                damaged |= self._fill_bucket(bucket, missing[bucket], file)
            finally:  # after an interruption too, so that encoded latents are kept
                file.close()
        return damaged

    def _fill_bucket(
        self, bucket: Bucket, pictures: list[BucketedPicture], file: "_CacheFile"
    ) -> dict[BucketedPicture, str]:
        size = self.form.pixels(bucket)
        at_once = max(ENCODED_AT_ONCE // (size[0] * size[1]), 1)
        damaged: dict[BucketedPicture, str] = {}
        keys: list[Key] = []
        images: list[Tensor] = []
        views = [(each, crop) for each in pictures for crop in self.crops.all_of(each)]
        last = views[-1]
        for view, pixels in map_in_threads(
            lambda view: view[0].pixels(size, view[1]), views, 2 * at_once, self.ask
        ):
            picture, crop = view
            self.done += 1
            if isinstance(pixels, PictureError):
                damaged[picture] = pixels.reason
            else:
                for mirrored in self.mirrorings:
                    if (key := picture.key(mirrored, crop)) not in self.cache:
                        keys.append(key)
                        images.append(pixels.flip(-1) if mirrored else pixels)
            if images and (len(images) >= at_once or view is last):
                file.add(keys, self._encode(images, bucket))
                keys, images = [], []
                if self.report is not None:
                    self.report(self.done, self.total)
        return damaged

    @torch.no_grad()
    def _encode(self, images: list[Tensor], bucket: Bucket) -> Tensor:
        latents = self.encode(torch.stack(images).float() / 255).float().cpu()
        network, expected = self.form.network, (len(images), *self.form.shape(bucket))
        if (len(latents), *latents.shape[-2:]) != (len(images), *self.form.positions(bucket)):
            raise CascadeError(
                f"The {network} made latents of shape {tuple(latents.shape)} from {counted(len(images), 'picture')} "
                f"of {bucket}; expected {expected}. Is it the {network}?"
            )
        if not latents.isfinite().all():
            raise CascadeError(
                f"The {network}'s latents hold NaN or infinity; run it in float32, or use another file."
            )
        return latents


class _CacheFile:
    """Rows collected until there are enough for a file."""

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
