"""Training data: pictures and captions as batches of Stage C latents, each a pure function of (seed, step, rank)."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CascadeError, counted
from ..processes import Processes
from ..settings import DataSetSettings, DataSettings
from .access import Access
from .bucket_data import BucketData
from .bucketing import BucketedPicture, Crops, assign_buckets, resized
from .buckets import Bucket
from .cache import Cache, Key
from .captions import trained_captions
from .decoding import PictureDecoder, View
from .epochs import MAX_ROWS, EpochPlan, batches_per_epoch, epoch_repeats, generator
from .exchange import exchange
from .image_prompts import ImagePrompts
from .latents import LatentEncoder
from .loss_masks import LossMasks
from .pictures import Skipped, TrainingPicture
from .sources import LEFT_OUT, find_all, reasons

Found = tuple[list[TrainingPicture], list[Skipped]]  # result of `find_all`
_ALONE = DataSetSettings(folder=".")  # for pictures outside of data.sets
MAX_BYTES_IN_MEMORY = 4_000_000_000  # of latents; more stay in the mapped files of the cache


@dataclass(frozen=True)
class Batch:
    """Rows of one bucket, all with the same number of image prompts."""

    keys: list[str]  # the pictures' names
    captions: list[str]
    latents: Tensor  # (B, 16, h, w) float32, the semantic compressor's
    images: Tensor | None  # (B, 3, 32·h, 32·w) uint8, as the compressor reads them, where the task needs them
    caption_ids: Tensor  # (B,) int64, indices into TrainingData.captions
    image_prompts: Tensor | None = None  # (B, n, E) float32, zeros where they are left out; None where n is 0
    weights: Tensor | None = None  # (B,) float32, of each picture in the loss; None where all are 1
    masks: Tensor | None = (
        None  # (B, h, w) float32, of each position in the loss, 1 on average; None without masks
    )
    # weight of this batch's mean in the mean over processes, so that every picture counts the same even if batches
    # differ in size
    share: float = 1.0
    cache_keys: Sequence[Key] = ()  # of the pictures as shown (mirrored, cropped), for cached latents


def fill_cache(
    settings: DataSettings,
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    processes: Processes,
    report: Callable[[int, int], None] | None = None,
    image_prompts: ImagePrompts | None = None,
    found: Found | None = None,
    access: Access | None = None,
) -> None:
    """Encodes this process's share of latents and image prompts, and exchanges it, so that all are in the cache."""
    access = access or Access()
    pictures, _ = found or find_all(settings, access)
    rank, ranks = processes.process_index, processes.num_processes

    bucketed, _ = processes.on_each(lambda: _assign_buckets(settings, pictures, access))
    encoder = _latent_encoder(settings, encode, fingerprint, report, access)
    encoder.fill_together(bucketed, processes)
    if image_prompts is not None:
        prompted = [each.picture for each in bucketed]
        processes.on_each(lambda: image_prompts.fill(prompted[rank::ranks], report, access.ask))
        exchange(image_prompts.cache, image_prompts.keys(prompted), processes)


def _assign_buckets(
    settings: DataSettings, pictures: list[TrainingPicture], access: Access
) -> tuple[list[BucketedPicture], list[Skipped]]:
    sizes = Cache(settings.cache, "sizes")
    return assign_buckets(pictures, settings, sizes, access.ask)


def epoch_steps(
    settings: DataSettings,
    pictures: list[TrainingPicture],
    rows_of_a_batch: int,
    access: Access,
    with_prompts: bool = False,
) -> int:
    """Number of batches in an epoch, computed from the pictures' headers before any is encoded."""
    bucketed, _ = _assign_buckets(settings, pictures, access)
    counts = Counter()
    for each in bucketed:
        bucket = each.bucket, len(each.picture.image_prompts) if with_prompts else 0
        counts[bucket] += set_of(settings, each.picture).repeat
    repeat = epoch_repeats(max(counts.total(), 1), settings.repeat)
    return sum(batches_per_epoch(count, repeat, rows_of_a_batch) for count in counts.values())


def set_of(settings: DataSettings, picture: TrainingPicture) -> DataSetSettings:
    """The set of data.sets that a picture belongs to."""
    return settings.sets[picture.set] if picture.set >= 0 else _ALONE


def crops_of(settings: DataSettings) -> Crops:
    return Crops(settings.crops, settings.crop_zoom)


def _latent_encoder(
    settings: DataSettings, encode, fingerprint: str, report, access: Access
) -> LatentEncoder:
    cache = Cache(settings.cache, fingerprint)
    return LatentEncoder(encode, cache, settings.flip, report, access.ask, crops_of(settings))


class TrainingData:
    """Pictures with their latents, in buckets; with image prompts where there is an encoder for them.

    encode: (B, 3, H, W) float32 in [0, 1], of a size that the compressor reads -> (B, 16, h, w).
    fingerprint: changes with what encode computes (`cache.fingerprint`).
    report: called with the number of latents encoded so far and in total.
    image_prompts: embeds the image prompts, and is then released.
    pictures: result of `find_all`, if it was called already.
    access: limits on reading, and the request to stop.
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
        pictures: Found | None = None,
        access: Access | None = None,
    ):
        self.settings, self.seed, self.image_prompts = settings, seed, image_prompts
        access = access or Access()
        self.crops = crops_of(settings)
        found, left_out = pictures or find_all(settings, access)
        bucketed, unreadable = _assign_buckets(settings, found, access)
        self.unused_prompts = self._count_prompts(bucketed)
        encoder = _latent_encoder(settings, encode, fingerprint, report, access)
        masks = LossMasks(Cache(settings.cache, "masks"), self.crops, settings.unmasked_weight)
        faults = encoder.fill(bucketed) | masks.fill(bucketed, access.ask)
        if image_prompts is not None:
            unprompted = image_prompts.fill([each.picture for each in bucketed], report, access.ask)
            faults |= {each: unprompted[each.picture] for each in bucketed if each.picture in unprompted}
            image_prompts.release()
        usable = [each for each in bucketed if each not in faults]
        faulty = [Skipped(each.picture.name, reason) for each, reason in faults.items()]
        self.skipped = [*left_out, *unreadable, *faulty]
        if not usable:
            raise CascadeError(
                f"No picture can be trained on, of {len(found):,}: {reasons(self.skipped)}; give pictures "
                "as PNG, JPEG or WebP."
            )
        self.captions = [""]
        self._buckets = self._group(usable, encoder, masks)
        shown = sum(len(bucket.shown) for bucket in self._buckets)
        if shown > MAX_ROWS:
            raise CascadeError(
                f"The repeats of data.sets make {shown:,} pictures an epoch, but at most {MAX_ROWS:,} are shown; give "
                "smaller ones."
            )
        if sum(bucket.nbytes for bucket in self._buckets) <= MAX_BYTES_IN_MEMORY:
            for bucket in self._buckets:
                bucket.load_to_memory()
            encoder.cache.rows.clear()
        self._plan: tuple[tuple[int, int], EpochPlan] | None = None
        self._repeat = epoch_repeats(shown, settings.repeat)
        self._decoder = PictureDecoder() if with_images else None

    def _count_prompts(self, pictures: list[BucketedPicture]) -> int:
        """Number of pictures with unused image prompts. Raises CascadeError for an encoder that has none to encode."""
        prompted = sum(bool(each.picture.image_prompts) for each in pictures)
        if self.image_prompts is None:
            return prompted
        if not prompted:
            raise CascadeError(
                "models.image_encoder is given, but no picture has image prompts; put them beside the pictures "
                "(0001.prompt0.png beside 0001.png), or leave it out."
            )
        return 0

    def _group(
        self, pictures: list[BucketedPicture], encoder: LatentEncoder, masks: LossMasks
    ) -> list[BucketData]:
        """Pictures grouped by bucket and number of image prompts. Adds their captions to `captions`."""
        ids = {"": 0}
        texts = {
            each: trained_captions(each.picture.captions, self.settings, each.picture.set)
            for each in pictures
        }
        grouped: dict[tuple[Bucket, int], list[BucketedPicture]] = {}
        for each in pictures:
            for text in texts[each]:
                ids.setdefault(text, len(ids))
            count = len(each.picture.image_prompts) if self.image_prompts is not None else 0
            grouped.setdefault((each.bucket, count), []).append(each)
        self.captions = list(ids)
        return [
            BucketData(
                members,
                encoder,
                [[ids[text] for text in texts[each]] for each in members],
                prompts,
                [self._set(each.picture).repeat for each in members],
                masks.rows(members),
            )
            for (_, prompts), members in sorted(grouped.items())
        ]

    def _set(self, picture: TrainingPicture) -> DataSetSettings:
        return set_of(self.settings, picture)

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    @property
    def pictures(self) -> list[BucketedPicture]:
        """All pictures that are trained on, by bucket."""
        return [each for bucket in self._buckets for each in bucket.pictures]

    def summary(self) -> str:
        """One sentence for people."""
        sizes = ", ".join(map(str, self._buckets))
        changed = resized(self.pictures).sentence()
        notes = f"; {changed} (data.max_enlarge, data.max_crop)" if changed else ""
        if self.unused_prompts:
            notes += f"; the image prompts of {self.unused_prompts} are not used, as models.image_encoder is not given"
        if self.skipped:
            are = "is" if len(self.skipped) == 1 else "are"
            notes += f"; {len(self.skipped):,} {are} left out ({LEFT_OUT} lists all): {reasons(self.skipped)}"
        return f"{counted(len(self), 'picture')} with {counted(len(self.captions) - 1, 'caption')}: {sizes}{notes}."

    @property
    def rows_per_epoch(self) -> int:
        return sum(len(each.shown) for each in self._buckets) * self._repeat

    def steps_per_epoch(self, batch_size: int, ranks: int = 1) -> int:
        total = batch_size * ranks
        return sum(batches_per_epoch(len(each.shown), self._repeat, total) for each in self._buckets)

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of this rank at this step, whatever batches were requested before.

        The ranks share the rows of one batch of batch_size · ranks: rank 0 of 2 has every second one. With images,
        those of the next step are decoded in the meantime.
        """
        rows = self._choose(step, batch_size, rank, ranks)
        bucket = self._buckets[rows.bucket]
        images = None
        if self._decoder is not None:
            next_rows = self._choose(step + 1, batch_size, rank, ranks)
            images = self._decoder.images(self._views(rows), rows.mirrored)
            self._decoder.prefetch(self._views(next_rows))
        prompts = None
        if self.image_prompts is not None and bucket.image_prompts:
            prompts = self.image_prompts.embeddings([each.picture for each in rows.pictures])
            prompts = prompts * rows.prompted[:, None, None]
        return Batch(
            [each.picture.name for each in rows.pictures],
            [self.captions[i] for i in rows.caption_ids.tolist()],
            bucket.latents(rows.indices, rows.mirrored, rows.crops),
            images,
            rows.caption_ids,
            prompts,
            self._weights(rows.pictures),
            self._masks(rows),
            rows.share,
            [
                picture.key(bool(mirrored), crop)
                for (picture, crop), mirrored in zip(self._views(rows), rows.mirrored.tolist(), strict=True)
            ],
        )

    def _views(self, rows: "_Rows") -> list[View]:
        crops = rows.crops.tolist()
        return [
            (each, self.crops.of(each, number)) for each, number in zip(rows.pictures, crops, strict=True)
        ]

    def _masks(self, rows: "_Rows") -> Tensor | None:
        bucket = self._buckets[rows.bucket]
        weights = bucket.mask_weights(rows.indices, rows.mirrored, rows.crops, self.settings.unmasked_weight)
        if weights is None:
            return None
        return torch.where(rows.unmasked[:, None, None], torch.ones(()), weights)

    def _weights(self, pictures: list[BucketedPicture]) -> Tensor | None:
        weights = [self._set(each.picture).weight for each in pictures]
        return torch.tensor(weights) if any(weight != 1 for weight in weights) else None

    def _choose(self, step: int, batch_size: int, rank: int, ranks: int) -> "_Rows":
        total = batch_size * ranks
        epoch, position = divmod(step, self.steps_per_epoch(batch_size, ranks))
        number, rows = self._epoch(epoch, total)[position]
        indices = self._buckets[number].shown[rows]
        random = generator(self.seed, "rows", step)
        chance = torch.rand(3, len(indices), generator=random)
        prompted = torch.rand(len(indices), generator=random) >= self.settings.image_prompt_dropout
        views = torch.rand(2, len(indices), generator=generator(self.seed, "crops and masks", step))
        count, part = len(indices), slice(rank, None, ranks)
        if count < ranks:  # too few pictures for all ranks: some ranks share a row
            part = slice(rank % count, rank % count + 1)
        indices, chance, prompted, views = indices[part], chance[:, part], prompted[part], views[:, part]
        crops, unmasked = (views[0] * self.crops.count).long(), views[1] < self.settings.unmasked_share
        copies = len(range(rank % count, ranks, count)) if count < ranks else 1  # of one row, over all ranks
        share = len(indices) / copies * ranks / count
        mirrored = (chance[0] < 0.5).long() if self.settings.flip else torch.zeros_like(indices)
        bucket = self._buckets[number]
        without_words = chance[2] < self.settings.caption_dropout
        caption_ids = torch.where(without_words, 0, bucket.captions(indices, chance[1]))
        pictures = [bucket.pictures[index] for index in indices.tolist()]
        return _Rows(number, indices, mirrored, caption_ids, prompted, pictures, crops, unmasked, share)

    def _epoch(self, epoch: int, total_batch_size: int) -> EpochPlan:
        """The epoch's plan; the last one is kept."""
        if self._plan is None or self._plan[0] != (epoch, total_batch_size):
            counts = [len(each.shown) for each in self._buckets]
            plan = EpochPlan(counts, total_batch_size, self._repeat, self.seed, epoch)
            self._plan = (epoch, total_batch_size), plan
        return self._plan[1]


class _Rows(NamedTuple):
    """The rows of a batch, with mirroring, caption, prompts, crop and mask of each."""

    bucket: int  # its index
    indices: Tensor  # (B,) of the bucket's rows
    mirrored: Tensor  # (B,) 0 or 1
    caption_ids: Tensor  # (B,)
    prompted: Tensor  # (B,) whether with its image prompts
    pictures: list[BucketedPicture]
    crops: Tensor  # (B,) which part of each
    unmasked: Tensor  # (B,) bool, whether its mask is left out
    share: float  # as in Batch
