"""Training data: pictures and captions as batches of Stage C latents, each a pure function of (seed, step, rank)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CascadeError
from .bucket_data import Rows
from .bucketing import Placed, place
from .buckets import Bucket, buckets
from .cache import Cache
from .decoding import Decoder
from .epochs import batches_of, epoch_plan, generator
from .image_prompts import ImagePrompts
from .latents import Encoder
from .pictures import Picture, Skipped
from .sources import find_pictures

IN_MEMORY = 4_000_000_000  # bytes of latents; more stay in the mapped files of the cache


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from and what becomes of them."""

    folder: str | None = None  # of pictures with captions, subfolders too
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    size: int = 1024  # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: float = 0.05  # the share of rows that are trained without words
    image_prompt_dropout: float = 0.05  # the same without their image prompts, chosen apart from the words
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
        for name in ("caption_dropout", "image_prompt_dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise CascadeError(f"{name} is {share}; it is a share, from 0 to 1.")
        if self.repeat < 1:
            raise CascadeError(f"The data's repeat is {self.repeat}; it must be at least 1.")


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket, and of one number of image prompts."""

    keys: list[str]  # the pictures' names
    captions: list[str]
    latents: Tensor  # (B, 16, h, w) float32, the semantic compressor's
    images: Tensor | None  # (B, 3, 32·h, 32·w) uint8, as the compressor reads them, where asked for
    caption_ids: Tensor  # (B,) int64, places in TrainingData.captions
    image_prompts: Tensor | None = None  # (B, n, E) float32, zeros where they are left out; None where n is 0


@dataclass(frozen=True)
class BucketTensors:
    """All of a bucket, for training that keeps its data on the accelerator."""

    bucket: Bucket
    latents: Tensor  # (N, F, 16, h, w) float32; F is 2 where pictures are mirrored: as they are, mirrored
    caption_ids: Tensor  # (N, K) int64, places in TrainingData.captions; -1 beyond a picture's own
    caption_counts: Tensor  # (N,) int64


def fill_cache(
    settings: DataSettings,
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    rank: int,
    ranks: int,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Makes this rank's share of the latents: all accelerators fill one cache, where `TrainingData` finds them."""
    pictures, _ = find_pictures(settings.folder, settings.tars)
    placed, _ = _place(settings, pictures)
    _encoder(settings, encode, fingerprint, report).fill(placed[rank::ranks])


def _place(settings: DataSettings, pictures: list[Picture]) -> tuple[list[Placed], list[Skipped]]:
    return place(pictures, buckets(settings.size, settings.bucket_step), Cache(settings.cache, "sizes"))


def _encoder(settings: DataSettings, encode, fingerprint: str, report) -> Encoder:
    return Encoder(encode, Cache(settings.cache, fingerprint), settings.flip, report)


class TrainingData:
    """Pictures with their latents, in buckets; image prompts count where there is an encoder for them.

    encode: (B, 3, H, W) float32 in [0, 1], of a size that the compressor reads -> (B, 16, h, w).
    fingerprint: changes with what encode computes (`cache.fingerprint`).
    report: called as latents are made, with how many pictures are done and how many there are to do.
    image_prompts: embeds the pictures that prompt for others, and is then let go.
    captions: every caption that a batch can have; the empty one is the first.
    skipped: pictures that are left out, and why.
    """

    def __init__(
        self,
        settings: DataSettings,
        encode: Callable[[Tensor], Tensor],
        fingerprint: str,
        seed: int = 0,
        with_images: bool = False,
        report: Callable[[int, int], None] | None = None,
        image_prompts: ImagePrompts | None = None,
    ):
        self.settings, self.seed, self.image_prompts = settings, seed, image_prompts
        pictures, self.skipped = find_pictures(settings.folder, settings.tars)
        placed, unreadable = _place(settings, pictures)
        encoder = _encoder(settings, encode, fingerprint, report)
        damaged = encoder.fill(placed)
        prompted = sum(bool(each.picture.image_prompts) for each in placed)
        self.unread_prompts = prompted if image_prompts is None else 0
        if image_prompts is not None:
            if not prompted:
                raise CascadeError(
                    "models.image_encoder is given, but no picture has image prompts; put them beside the pictures "
                    "(0001.prompt0.png beside 0001.png), or leave it out."
                )
            unprompted = image_prompts.fill([each.picture for each in placed], report)
            damaged |= {each: unprompted[each.picture] for each in placed if each.picture in unprompted}
            image_prompts.release()
        left = [each for each in placed if each not in damaged]
        self.skipped += [*unreadable, *(Skipped(each.picture.name, why) for each, why in damaged.items())]
        if not left:
            raise CascadeError(
                f"None of the {len(pictures)} pictures can be read, such as {self.skipped[-1]}; give pictures as "
                "PNG, JPEG or WebP."
            )
        ids: dict[str, int] = {"": 0}
        for each in left:
            for text in each.picture.captions:
                ids.setdefault(text, len(ids))
        self.captions = list(ids)
        grouped: dict[tuple[Bucket, int], list[Placed]] = {}
        for each in left:
            prompts = len(each.picture.image_prompts) if image_prompts is not None else 0
            grouped.setdefault((each.bucket, prompts), []).append(each)
        self._buckets = [Rows(grouped[kind], encoder, ids, kind[1]) for kind in sorted(grouped)]
        if sum(rows.nbytes for rows in self._buckets) <= IN_MEMORY:
            for rows in self._buckets:
                rows.bring_together()
            encoder.cache.rows.clear()
        self._plan: tuple[tuple[int, int], list[tuple[int, Tensor]]] | None = None
        self._decoder = Decoder() if with_images else None

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def summary(self) -> str:
        """One sentence for people."""
        sizes = ", ".join(map(str, self._buckets))
        enlarged = sum(each.scale > 1 for rows in self._buckets for each in rows.placed)
        notes = f"; {enlarged} are smaller and were enlarged" if enlarged else ""
        if self.unread_prompts:
            notes += f"; the image prompts of {self.unread_prompts} are not used, as models.image_encoder is not given"
        if self.skipped:
            notes += f"; {len(self.skipped)} are left out, such as {self.skipped[0]}"
        return f"{len(self)} pictures with {len(self.captions) - 1} captions: {sizes}{notes}."

    def as_tensors(self) -> list[BucketTensors]:
        """Every bucket in memory as a whole."""
        return [
            BucketTensors(rows.bucket, rows.all_latents(), rows.caption_ids, rows.caption_counts)
            for rows in self._buckets
        ]

    def steps_per_epoch(self, batch_size: int, ranks: int = 1) -> int:
        return sum(batches_of(len(rows), self.settings.repeat, batch_size * ranks) for rows in self._buckets)

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Batch:
        """What this rank trains on at this step; the same whatever was asked before.

        The ranks share the rows of one batch of batch_size · ranks: rank 0 of 2 has every second one. Where images are
        asked for, those of the next step are decoded in the meantime.
        """
        chosen = self._choose(step, batch_size, rank, ranks)
        images = None
        if self._decoder is not None:
            following = self._choose(step + 1, batch_size, rank, ranks)
            images = self._decoder.images(chosen.placed, chosen.mirrored)
            self._decoder.begin(following.placed)
        prompts = None
        if self.image_prompts is not None and self._buckets[chosen.bucket].prompts:
            prompts = self.image_prompts.embeddings([each.picture for each in chosen.placed])
            prompts = prompts * chosen.prompted[:, None, None]
        return Batch(
            [each.picture.name for each in chosen.placed],
            [self.captions[i] for i in chosen.caption_ids.tolist()],
            self._buckets[chosen.bucket].latents(chosen.rows, chosen.mirrored),
            images,
            chosen.caption_ids,
            prompts,
        )

    def _choose(self, step: int, batch_size: int, rank: int, ranks: int) -> "_Chosen":
        together = batch_size * ranks
        epoch, at = divmod(step, self.steps_per_epoch(batch_size, ranks))
        bucket, rows = self._epoch(epoch, together)[at]
        random = generator(self.seed, "rows", step)
        chance = torch.rand(3, len(rows), generator=random)
        prompted = torch.rand(len(rows), generator=random) >= self.settings.image_prompt_dropout
        mine = slice(rank, None, ranks)
        if len(rows) < ranks:  # a bucket with fewer pictures: some ranks share a row rather than have none
            mine = slice(rank % len(rows), rank % len(rows) + 1)
        rows, chance, prompted = rows[mine], chance[:, mine], prompted[mine]
        mirrored = (chance[0] < 0.5).long() if self.settings.flip else torch.zeros_like(rows)
        held = self._buckets[bucket]
        caption_ids = torch.where(
            chance[2] < self.settings.caption_dropout, 0, held.captions(rows, chance[1])
        )
        placed = [held.placed[row] for row in rows.tolist()]
        return _Chosen(bucket, rows, mirrored, caption_ids, prompted, placed)

    def _epoch(self, epoch: int, together: int) -> list[tuple[int, Tensor]]:
        """The epoch's plan; the one last asked for is kept."""
        if self._plan is None or self._plan[0] != (epoch, together):
            counts = [len(rows) for rows in self._buckets]
            plan = epoch_plan(counts, together, self.settings.repeat, self.seed, epoch)
            self._plan = (epoch, together), plan
        return self._plan[1]


class _Chosen(NamedTuple):
    """What a batch is made of."""

    bucket: int
    rows: Tensor  # (B,) of the bucket
    mirrored: Tensor  # (B,) 0 or 1
    caption_ids: Tensor  # (B,)
    prompted: Tensor  # (B,) whether with its image prompts
    placed: list[Placed]
