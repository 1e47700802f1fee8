"""The pictures of one bucket as tensors: latents and captions by row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bucketing import BucketedPicture
from .latents import LatentEncoder


class BucketData:
    """Rows of one bucket, all with the same number of image prompts.

    caption_ids: (N, K) int64, indices of captions, -1 beyond a picture's own; caption_counts: (N,).
    """

    def __init__(
        self,
        pictures: list[BucketedPicture],
        encoder: LatentEncoder,
        captions: Sequence[Sequence[int]],
        image_prompts: int = 0,
        repeats: Sequence[int] = (),
    ):
        """captions: the indices of each picture's; image_prompts: how many each picture has; repeats: of each."""
        self.pictures, self.encoder, self.image_prompts = pictures, encoder, image_prompts
        self.bucket = pictures[0].bucket
        longest = max(map(len, captions))
        self.caption_counts = torch.tensor([len(each) for each in captions])
        self.caption_ids = torch.tensor([[*each, *[-1] * (longest - len(each))] for each in captions])
        # (M,), the rows that an epoch shows: each as often as its set says
        self.shown = torch.arange(len(pictures))
        if repeats:
            self.shown = self.shown.repeat_interleave(torch.tensor(repeats))
        self.in_memory: Tensor | None = None  # (N, F, 16, h, w)

    def __len__(self) -> int:
        return len(self.pictures)

    def __str__(self) -> str:
        count = self.image_prompts
        prompts = f" with {count} image prompt{'s' * (count > 1)}" * (count > 0)
        return f"{len(self)} of {self.bucket}{prompts}"

    @property
    def nbytes(self) -> int:
        latent = self.encoder.cache.rows[self.pictures[0].key(False)]
        return latent.nbytes * len(self.pictures) * len(self.encoder.variants)

    def all_latents(self) -> Tensor:
        """(N, F, 16, h, w) float32; F is 2 where pictures are mirrored: as they are, mirrored."""
        if self.in_memory is not None:
            return self.in_memory
        variants = [
            self.encoder.cache.stack(picture.key(mirrored) for picture in self.pictures)
            for mirrored in self.encoder.variants
        ]
        return torch.stack(variants, dim=1)

    def load_to_memory(self) -> None:
        """Gather all rows in one tensor, so that a batch is one indexing operation."""
        self.in_memory = self.all_latents()

    def latents(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """(B, 16, h, w) of these rows (B,), from memory or from the mapped files; mirrored: (B,) 0 or 1."""
        if self.in_memory is not None:
            return self.in_memory[rows, mirrored]
        variants = zip(rows.tolist(), mirrored.tolist(), strict=True)
        return self.encoder.cache.stack(self.pictures[row].key(bool(flipped)) for row, flipped in variants)

    def captions(self, rows: Tensor, chance: Tensor) -> Tensor:
        """Draw a caption of each row, by chance (B,) in [0, 1): its id, (B,)."""
        return self.caption_ids[rows, (chance * self.caption_counts[rows]).long()]
