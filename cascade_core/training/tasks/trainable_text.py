"""Captions through a text encoder that is being trained, or that learned tokens go through: with gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...text.encoder import TextEncoder, encode_tokens
from ...text.learned_tokens import TokenTable

Names = Mapping[str, Sequence[int]]


class TrainableText:
    """Captions by their ids, tokenised once; only the first chunk of a long one counts, and prompt weights do not.

    encoder    on its device
    names      of learned tokens, as captions have them, with the ids of their vectors
    table      returns the learned tokens' present vectors
    """

    def __init__(
        self,
        encoder: TextEncoder,
        captions: Sequence[str],
        names: Names | None = None,
        table: Callable[[], TokenTable] | None = None,
    ):
        self.encoder, self.names, self.table = encoder, names, table
        self.tokens = self._rows(captions)  # (N, 77)

    def __call__(self, caption_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) on the CPU -> states (B, 77, C), pooled (B, P)"""
        return self._encode(self.tokens[caption_ids])

    def of(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States and pooled states of other texts."""
        return self._encode(self._rows(texts))

    def _rows(self, texts: Sequence[str]) -> Tensor:
        chunks = [self.encoder.tokenizer.chunks(text, self.names)[0] for text in texts]
        return torch.tensor([[token for token, _ in chunk] for chunk in chunks])

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        model = self.encoder.model
        tokens = self.table() if self.table is not None else None
        return encode_tokens(model, rows.to(model.device), self.encoder.tokenizer.end_token, tokens)
