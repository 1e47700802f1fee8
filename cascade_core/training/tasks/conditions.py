"""Conditions, on the accelerator: Stage C's text states and image prompts, Stage B's latent and pooled text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.text_cache import TextCache

MAX_BYTES_ON_ACCELERATOR = 6_000_000_000  # bytes of text states that are kept on the accelerator
AT_ONCE = 1024  # captions copied there in one piece


class Conditions(NamedTuple):
    """Stage C's arguments of these names: (B, T, C), (B, 1, P), (B, n, E)."""

    clip_text: Tensor
    clip_text_pooled: Tensor
    clip_img: Tensor

    @classmethod
    def of(
        cls,
        states: Tensor,
        pooled: Tensor,
        c_image: int,
        dtype: torch.dtype,
        image_prompts: Tensor | None = None,
    ) -> "Conditions":
        """image_prompts: (B, n, E); None stands for one of zeros."""
        if image_prompts is None:
            image_prompts = states.new_zeros(1, 1, c_image).expand(len(states), -1, -1)
        return cls(states.to(dtype), pooled.to(dtype)[:, None], image_prompts.to(dtype))


class StageBConditions(NamedTuple):
    """Stage B's arguments of these names: (B, 16, h, w), (B, 1, P)."""

    effnet: Tensor
    clip: Tensor


class CachedText:
    """The states of `captions` by id, the index of a caption; all are kept on the accelerator if they fit."""

    def __init__(
        self,
        cache: TextCache,
        captions: list[str],
        device: torch.device,
        max_bytes: int = MAX_BYTES_ON_ACCELERATOR,
    ):
        cache.fill(captions)
        self.cache, self.captions, self.device = cache, captions, device
        self.table = None
        if device.type != "cpu":
            self.table = self._table(max_bytes)

    def _table(self, max_bytes: int) -> tuple[Tensor, Tensor] | None:
        """(states (N, T, C), pooled (N, P)) in half precision, as they are cached; None where they do not fit."""
        states, pooled = self.cache.states([""])
        if len(self.captions) * 2 * (states.numel() + pooled.numel()) > max_bytes:
            return None
        count = len(self.captions)
        table = tuple(
            torch.empty(count, *value.shape[1:], dtype=torch.half, device=self.device)
            for value in (states, pooled)
        )
        for start in range(0, count, AT_ONCE):
            part = self.cache.states(self.captions[start : start + AT_ONCE])
            if part.states.shape[1] != states.shape[1]:
                # With a long caption, all others would be padded to its length.
                return None
            for rows, values in zip(table, part, strict=True):
                rows[start : start + len(values)] = values
        return table[0], table[1]

    def __call__(self, caption_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) on the CPU -> states (B, T, C), pooled (B, P) on the accelerator"""
        if self.table is not None:
            rows = caption_ids.to(self.device)
            return self.table[0][rows], self.table[1][rows]
        states, pooled = self.cache.states([self.captions[i] for i in caption_ids.tolist()])
        return states.to(self.device), pooled.to(self.device)

    def of(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States and pooled states of texts, which must be among those that were cached."""
        states, pooled = self.cache.states(texts)
        return states.to(self.device), pooled.to(self.device)
