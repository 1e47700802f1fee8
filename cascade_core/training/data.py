"""Training data: pictures and captions as batches of Stage C latents, each a pure function of (seed, step, rank)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import torch
from torch import Tensor

from ..errors import CascadeError
from .buckets import Bucket, buckets
from .cache import Cache
from .latents import Encoder, Placed, place
from .order import epoch_plan, generator
from .sources import find_pictures


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from and what becomes of them."""

    folder: str | None = None  # of pictures with captions, subfolders too
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    size: int = 1024  # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: float = 0.05  # the share of rows that are trained without words
    flip: bool = False  # half of the rows are mirrored
    cache: str | None = None  # folder where latents are kept between runs
    repeat: int = 1  # how often an epoch shows each picture

    def __post_init__(self) -> None:
        object.__setattr__(self, "tars", (self.tars,) if isinstance(self.tars, str) else tuple(self.tars))
        if self.folder is None and not self.tars:
            raise CascadeError("The training data has neither a folder nor tars; name one of them.")
        if not 64 <= self.size <= 4096:
            raise CascadeError(f"The data's size is {self.size}; it must lie within 64 and 4096 pixels.")
        if not 8 <= self.bucket_step <= self.size:
            raise CascadeError(
                f"The data's bucket_step is {self.bucket_step}; it must lie within 8 and the size, {self.size}."
            )
        if not 0 <= self.caption_dropout <= 1:
            raise CascadeError(f"caption_dropout is {self.caption_dropout}; it is a share, from 0 to 1.")
        if self.repeat < 1:
            raise CascadeError(f"The data's repeat is {self.repeat}; it must be at least 1.")


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket."""

    keys: list[str]  # the pictures' names
    captions: list[str]
    latents: Tensor  # (B, 16, h, w) float32, the semantic compressor's
    images: Tensor | None  # (B, 3, H, W) float32 in [0, 1], of the bucket's size, where asked for
    caption_ids: Tensor  # (B,) int64, places in TrainingData.captions


@dataclass(frozen=True)
class BucketTensors:
    """All of a bucket, for training that keeps its data on the accelerator."""

    bucket: Bucket
    latents: Tensor  # (N, F, 16, h, w) float32; F is 2 where pictures are mirrored: as they are, mirrored
    caption_ids: Tensor  # (N, K) int64, places in TrainingData.captions; -1 beyond a picture's own
    caption_counts: Tensor  # (N,) int64


class TrainingData:
    """Pictures with their latents, in buckets.

    encode: (B, 3, H, W) float32 in [0, 1], of a size that the compressor reads -> (B, 16, h, w).
    fingerprint: changes with what encode computes (`cache.fingerprint`).
    report: called as latents are made, with how many there are and how many there will be.
    """

    def __init__(
        self,
        settings: DataSettings,
        encode: Callable[[Tensor], Tensor],
        fingerprint: str,
        seed: int = 0,
        with_images: bool = False,
        report: Callable[[int, int], None] | None = None,
    ):
        self.settings, self.seed, self.with_images = settings, seed, with_images
        pictures, self.skipped = find_pictures(settings.folder, settings.tars)
        sizes = buckets(settings.size, settings.bucket_step)
        placed, damaged = place(pictures, sizes, Cache(settings.cache, "sizes"))
        encoder = Encoder(encode, Cache(settings.cache, fingerprint), settings.flip, report)
        damaged += encoder.fill(placed)
        self.skipped += damaged
        out = {each.name for each in damaged}
        placed = [each for each in placed if each.picture.name not in out]
        if not placed:
            raise CascadeError(
                f"None of the {len(pictures)} pictures can be read, such as {damaged[0]}; give pictures as "
                "PNG, JPEG or WebP."
            )
        self.captions = [""]
        ids: dict[str, int] = {"": 0}
        for each in placed:
            for text in each.picture.captions:
                if text not in ids:
                    ids[text] = len(self.captions)
                    self.captions.append(text)
        grouped: dict[Bucket, list[Placed]] = {}
        for each in placed:
            grouped.setdefault(each.bucket, []).append(each)
        self.pictures = [grouped[bucket] for bucket in sorted(grouped)]
        self.tensors = [_tensors(rows, encoder, ids) for rows in self.pictures]
        self._plan: tuple[tuple[int, int], list[tuple[int, Tensor]]] | None = None
        self._pool = ThreadPoolExecutor(min(16, cpu_count() or 1)) if with_images else None

    def __len__(self) -> int:
        return sum(map(len, self.pictures))

    def summary(self) -> str:
        """One sentence for people."""
        sizes = ", ".join(f"{len(rows)} of {rows[0].bucket}" for rows in self.pictures)
        out = f"; {len(self.skipped)} left out, such as {self.skipped[0]}" if self.skipped else ""
        return f"{len(self)} pictures with {len(self.captions) - 1} captions: {sizes}{out}."

    def as_tensors(self) -> list[BucketTensors]:
        return self.tensors

    def steps_per_epoch(self, batch_size: int, ranks: int = 1) -> int:
        return len(self._epoch(0, batch_size * ranks))

    def _epoch(self, epoch: int, together: int) -> list[tuple[int, Tensor]]:
        key = (epoch, together)
        held = self._plan
        if held is None or held[0] != key:
            counts = [len(rows) for rows in self.pictures]
            held = key, epoch_plan(counts, together, self.settings.repeat, self.seed, epoch)
            self._plan = held
        return held[1]

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Batch:
        """What this rank trains on at this step; the same whatever was asked before."""
        epoch, at = divmod(step, self.steps_per_epoch(batch_size, ranks))
        number, rows = self._epoch(epoch, batch_size * ranks)[at]
        chance = torch.rand(3, len(rows), generator=generator(self.seed, "rows", step))
        mine = slice(rank, None, ranks)
        if len(rows) < ranks:  # the last of a bucket: some ranks share a row rather than have none
            mine = slice(rank % len(rows), rank % len(rows) + 1)
        rows, chance = rows[mine], chance[:, mine]
        tensors = self.tensors[number]
        mirrored = (chance[0] < 0.5).long() if self.settings.flip else torch.zeros_like(rows)
        pick = (chance[1] * tensors.caption_counts[rows]).long()
        caption_ids = tensors.caption_ids[rows, pick]
        caption_ids = torch.where(chance[2] < self.settings.caption_dropout, 0, caption_ids)
        pictures = [self.pictures[number][row] for row in rows.tolist()]
        return Batch(
            [each.picture.name for each in pictures],
            [self.captions[i] for i in caption_ids.tolist()],
            tensors.latents[rows, mirrored],
            self._images(pictures, mirrored) if self._pool is not None else None,
            caption_ids,
        )

    def _images(self, pictures: list[Placed], mirrored: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]"""
        assert self._pool is not None
        images = list(self._pool.map(lambda each: each.pixels(each.bucket), pictures))
        turned = [
            image.flip(-1) if flip else image for image, flip in zip(images, mirrored.tolist(), strict=True)
        ]
        return torch.stack(turned).float() / 255


def _tensors(rows: list[Placed], encoder: Encoder, ids: dict[str, int]) -> BucketTensors:
    variants = [encoder.cache.stack(each.key(mirrored) for each in rows) for mirrored in encoder.variants]
    captions = [[ids[text] for text in each.picture.captions] for each in rows]
    counts = torch.tensor([len(each) for each in captions])
    most = int(counts.max())
    padded = torch.tensor([each + [-1] * (most - len(each)) for each in captions])
    return BucketTensors(rows[0].bucket, torch.stack(variants, dim=1), padded, counts)
