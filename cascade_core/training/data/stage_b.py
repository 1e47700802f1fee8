"""Stage B's training data: Stage A's latents, and the compressor's of the same pictures at several sizes, cached."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...geometry import COMPRESSOR_STRIDE, LATENT_CHANNELS, stage_b_size, whole_size
from ..settings import StageBSettings
from .batches import TrainingData
from .bucketing import BucketedPicture
from .buckets import Bucket
from .cache import Cache, Key, key_of
from .latents import LatentEncoder, LatentForm

Encode = Callable[[Tensor], Tensor]  # (B, 3, H, W) float32 in [0, 1] -> (B, C, h, w)


def _stage_a_pixels(bucket: Bucket) -> tuple[int, int]:
    return whole_size(*bucket)


def _stage_a_positions(bucket: Bucket) -> tuple[int, int]:
    return stage_b_size(*whole_size(*bucket))


def _compressor_positions(scale: float, bucket: Bucket) -> tuple[int, int]:
    height, width = (max(int(side * scale) // COMPRESSOR_STRIDE, 1) for side in bucket)
    return height, width


def _compressor_pixels(scale: float, bucket: Bucket) -> tuple[int, int]:
    height, width = _compressor_positions(scale, bucket)
    return height * COMPRESSOR_STRIDE, width * COMPRESSOR_STRIDE


def stage_a_form(channels: int) -> LatentForm:
    return LatentForm("Stage A", channels, _stage_a_pixels, _stage_a_positions)


def compressor_form(scale: float) -> LatentForm:
    """The compressor's form for a picture resized to this share of its bucket's sides."""
    pixels, positions = partial(_compressor_pixels, scale), partial(_compressor_positions, scale)
    return LatentForm("compressor", LATENT_CHANNELS["stage_c"], pixels, positions)


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
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
    ):
        self.settings = settings

        def encoder(encode: Encode, digest: str, form: LatentForm) -> LatentEncoder:
            cache = Cache(data.settings.cache, digest)
            return LatentEncoder(encode, cache, data.settings.flip, report, ask, data.crops, form)

        encode, digest = compressor
        self.stage_a = encoder(*stage_a, stage_a_form(channels))
        self.compressors = [
            encoder(encode, key_of(digest, "scale", scale).hex(), compressor_form(scale))
            for scale in settings.scales
        ]
        pictures: list[BucketedPicture] = data.pictures
        for each in (self.stage_a, *self.compressors):
            each.fill(pictures)

    def __call__(self, keys: Sequence[Key], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w), and the compressor's (B, 16, h', w'), on the CPU. keys: of the batch's pictures"""
        s = self.settings
        number = int(torch.randint(len(self.compressors), (1,), generator=generator))
        effnet = self.compressors[number].cache.stack(keys)
        chance, strength = torch.rand(2, len(keys), 1, 1, 1, generator=generator)
        if s.noise:
            effnet = effnet + s.noise * strength * torch.randn(effnet.shape, generator=generator)
        return self.stage_a.cache.stack(keys), effnet * (chance >= s.dropout)
