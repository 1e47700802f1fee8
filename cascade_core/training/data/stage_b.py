"""Stage B's training data: Stage A's latents, and the compressor's of the same pictures at several sizes, cached."""

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...geometry import COMPRESSOR_STRIDE, LATENT_CHANNELS, stage_b_size, whole_size
from ..processes import Processes
from ..settings import StageBSettings
from .batches import Batch, TrainingData
from .bucketing import BucketedPicture
from .buckets import Bucket
from .cache import Cache, key_of
from .latents import LatentEncoder, LatentForm

Encode = Callable[[Tensor], Tensor]  # (B, 3, H, W) float32 in [0, 1] -> (B, C, h, w)
Size = tuple[int, int]  # height and width in the compressor's positions
SMALLEST = 0.5  # share of a picture's sides, as published


def _stage_a_pixels(bucket: Bucket) -> tuple[int, int]:
    return whole_size(*bucket)


def _stage_a_positions(bucket: Bucket) -> tuple[int, int]:
    return stage_b_size(*whole_size(*bucket))


def _positions(bucket: Bucket, scale: float) -> Size:
    """The compressor's positions for a picture resized to this share of its bucket's sides."""
    height, width = (max(int(side * scale) // COMPRESSOR_STRIDE, 1) for side in bucket)
    return height, width


def published_sizes(bucket: Bucket) -> tuple[list[float], list[Size]]:
    """All sizes that the published training draws, of half the bucket's sides to the whole.

    Returns (the share at which each begins, their positions); the compressor's stride makes them finitely many.
    """
    steps = {i * COMPRESSOR_STRIDE / side for side in bucket for i in range(1, side // COMPRESSOR_STRIDE + 1)}
    begins = [SMALLEST, *sorted(step for step in steps if SMALLEST < step < 1)]
    return begins, [_positions(bucket, (a + b) / 2) for a, b in pairwise([*begins, 1.0])]


def stage_a_form(channels: int) -> LatentForm:
    return LatentForm("Stage A", channels, _stage_a_pixels, _stage_a_positions)


def compressor_form(size: Size) -> LatentForm:
    """The compressor's form for a picture resized to this many positions."""
    pixels = size[0] * COMPRESSOR_STRIDE, size[1] * COMPRESSOR_STRIDE
    return LatentForm("compressor", LATENT_CHANNELS["stage_c"], lambda bucket: pixels, lambda bucket: size)


def encoded(
    data: TrainingData,
    pictures: Sequence[BucketedPicture],
    encode: Encode,
    digest: str,
    form: LatentForm,
    processes: Processes,
    report: Callable[[int, int], None] | None,
    ask: Callable[[], None],
) -> LatentEncoder:
    """An encoder whose cache holds the latents of these pictures of `data`; each process encodes its share."""
    cache = Cache(data.settings.cache, digest)
    encoder = LatentEncoder(encode, cache, data.settings.flip, report, ask, data.crops, form)
    encoder.fill_together(pictures, processes)
    return encoder


class StageBData:
    """Stage A's latents of pictures, and the compressor's latents at a size drawn for each batch.

    stage_a, compress: the encoding functions, each with the digest of its network; channels: of Stage A's latent
    """

    def __init__(
        self,
        settings: StageBSettings,
        data: TrainingData,
        stage_a: tuple[Encode, str],
        compressor: tuple[Encode, str],
        channels: int,
        processes: Processes,
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
    ):
        self.settings = settings
        form, rank, ranks = stage_a_form(channels), processes.process_index, processes.num_processes
        self.stage_a = encoded(data, data.pictures, *stage_a, form, processes, report, ask)
        self.buckets = {key: each.bucket for each in data.pictures for key in self.stage_a.keys(each)}
        sizes = {bucket: set(self._sizes(bucket)) for bucket in {each.bucket for each in data.pictures}}
        members = {
            size: [each for each in data.pictures if size in sizes[each.bucket]]
            for size in sorted(set().union(*sizes.values()))
        }
        self.compressors: dict[Size, LatentEncoder] = {}
        shares = {size: len(pictures[rank::ranks]) for size, pictures in members.items()}
        done, total = 0, sum(shares.values())

        def report_all(now: int, here: int) -> None:
            if report is not None:
                report(done + now // data.crops.count, total)

        encode, digest = compressor
        for size, pictures in members.items():
            key = key_of(digest, "size", *size).hex()
            form = compressor_form(size)
            self.compressors[size] = encoded(data, pictures, encode, key, form, processes, report_all, ask)
            done += shares[size]

    def _sizes(self, bucket: Bucket) -> list[Size]:
        if self.settings.scales is None:
            return published_sizes(bucket)[1]
        return [_positions(bucket, scale) for scale in self.settings.scales]

    def _draw_size(self, bucket: Bucket, generator: torch.Generator) -> Size:
        if self.settings.scales is not None:
            number = int(torch.randint(len(self.settings.scales), (1,), generator=generator))
            return _positions(bucket, self.settings.scales[number])
        begins, sizes = published_sizes(bucket)
        share = SMALLEST + (1 - SMALLEST) * torch.rand(1, generator=generator).item()
        return sizes[bisect(begins, share) - 1]

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w), and the compressor's (B, 16, h', w'), on the CPU."""
        s, keys = self.settings, batch.cache_keys
        effnet = self.compressors[self._draw_size(self.buckets[keys[0]], generator)].cache.stack(keys)
        chance, strength = torch.rand(2, len(keys), 1, 1, 1, generator=generator)
        if s.noise:
            effnet = effnet + s.noise * strength * torch.randn(effnet.shape, generator=generator)
        return self.stage_a.cache.stack(keys), effnet * (chance >= s.dropout)


class HeldOutStageB:
    """The same of pictures that are measured on: undisturbed, with a latent of the size that Stage C makes."""

    def __init__(
        self,
        data: TrainingData,
        stage_a: tuple[Encode, str],
        channels: int,
        processes: Processes,
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
    ):
        self.stage_a = encoded(data, data.pictures, *stage_a, stage_a_form(channels), processes, report, ask)

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.stage_a.cache.stack(batch.cache_keys), batch.latents
