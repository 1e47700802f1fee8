"""The pictures of one bucket as tensors: latents and captions by row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .bucketing import Placed
from .latents import Encoder


class Rows:
    """placed: the pictures, with `prompts` image prompts each.

    caption_ids: (N, K), -1 beyond a picture's own; caption_counts: (N,).
    """

    def __init__(self, placed: list[Placed], encoder: Encoder, ids: Mapping[str, int], prompts: int = 0):
        self.placed, self.encoder, self.bucket, self.prompts = placed, encoder, placed[0].bucket, prompts
        captions = [[ids[text] for text in each.picture.captions] for each in placed]
        most = max(map(len, captions))
        self.caption_counts = torch.tensor([len(each) for each in captions])
        self.caption_ids = torch.tensor([each + [-1] * (most - len(each)) for each in captions])
        self.together: Tensor | None = None  # (N, F, 16, h, w)

    def __len__(self) -> int:
        return len(self.placed)

    def __str__(self) -> str:
        prompted = f" with {self.prompts} image prompt{'s' * (self.prompts > 1)}" * (self.prompts > 0)
        return f"{len(self)} of {self.bucket}{prompted}"

    @property
    def nbytes(self) -> int:
        one = self.encoder.cache.rows[self.placed[0].key(False)]
        return one.nbytes * len(self.placed) * len(self.encoder.variants)

    def all_latents(self) -> Tensor:
        """(N, F, 16, h, w) float32; F is 2 where pictures are mirrored: as they are, mirrored."""
        if self.together is not None:
            return self.together
        variants = [
            self.encoder.cache.stack(each.key(mirrored) for each in self.placed)
            for mirrored in self.encoder.variants
        ]
        return torch.stack(variants, dim=1)

    def bring_together(self) -> None:
        """One tensor in memory in place of single rows: a batch is then one indexing."""
        self.together = self.all_latents()

    def latents(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """(B, 16, h, w) of these rows, from memory or from the mapped files."""
        if self.together is not None:
            return self.together[rows, mirrored]
        chosen = zip(rows.tolist(), mirrored.tolist(), strict=True)
        return self.encoder.cache.stack(self.placed[row].key(bool(turned)) for row, turned in chosen)

    def captions(self, rows: Tensor, chance: Tensor) -> Tensor:
        """A caption of each row, by chance (B,) in [0, 1): its place, (B,)."""
        return self.caption_ids[rows, (chance * self.caption_counts[rows]).long()]
