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
        masks: Tensor | None = None,
    ):
        """captions: the indices of each picture's; image_prompts: how many each picture has; repeats: of each.

        masks: (N, crops, h, w) uint8; None where no picture has one.
        """
        self.pictures, self.encoder, self.image_prompts = pictures, encoder, image_prompts
        self.bucket = pictures[0].bucket
        longest = max(map(len, captions))
        self.caption_counts = torch.tensor([len(each) for each in captions])
        self.caption_ids = torch.tensor([[*each, *[-1] * (longest - len(each))] for each in captions])
        # (M,), the rows of an epoch: each as often as its set repeats it
        self.shown = torch.arange(len(pictures))
        if repeats:
            self.shown = self.shown.repeat_interleave(torch.tensor(repeats))
        self.in_memory: Tensor | None = None  # (N, F, 16, h, w)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.pictures)

    def __str__(self) -> str:
        count = self.image_prompts
        prompts = f" with {count} image prompt{'s' * (count > 1)}" * (count > 0)
        return f"{len(self)} of {self.bucket}{prompts}"

    @property
    def nbytes(self) -> int:
        latent = self.encoder.cache.rows[self.encoder.keys(self.pictures[0])[0]]
        return latent.nbytes * len(self.pictures) * self.encoder.variants

    def all_latents(self) -> Tensor:
        """(N, F, 16, h, w) float32, F the number of crops, or twice that: for each crop itself and its mirror image."""
        if self.in_memory is not None:
            return self.in_memory
        keys = [self.encoder.keys(picture) for picture in self.pictures]
        return torch.stack([self.encoder.cache.stack(each) for each in zip(*keys, strict=True)], dim=1)

    def load_to_memory(self) -> None:
        """Gathers all rows in one tensor, so that a batch is one indexing operation."""
        self.in_memory = self.all_latents()

    def latents(self, rows: Tensor, mirrored: Tensor, crops: Tensor) -> Tensor:
        """(B, 16, h, w) of these rows, from memory or from the mapped files. All (B,); mirrored: 0 or 1."""
        variants = crops * len(self.encoder.mirrorings) + mirrored
        if self.in_memory is not None:
            return self.in_memory[rows, variants]
        chosen = zip(rows.tolist(), variants.tolist(), strict=True)
        keys = (self.encoder.keys(self.pictures[row])[variant] for row, variant in chosen)
        return self.encoder.cache.stack(keys)

    def mask_weights(self, rows: Tensor, mirrored: Tensor, crops: Tensor, unmasked: float) -> Tensor | None:
        """(B, h, w) float32, of each position in the loss, 1 on average; None where no picture has a mask.

        unmasked: the weight of positions outside of the mask, where those inside have 1.
        """
        if self.masks is None:
            return None
        masks = self.masks[rows, crops].float() / 255
        masks = torch.where(mirrored.bool()[:, None, None], masks.flip(-1), masks)
        weights = unmasked + (1 - unmasked) * masks
        # So that a small mask weighs as much in the loss as a large one; a crop outside of the mask weighs nothing.
        return weights / weights.mean((1, 2), keepdim=True).clamp(min=1e-6)

    def captions(self, rows: Tensor, chance: Tensor) -> Tensor:
        """Draws a caption for each row by chance, (B,) in [0, 1). Returns caption ids (B,)."""
        return self.caption_ids[rows, (chance * self.caption_counts[rows]).long()]
