"""Encodes captions with gradients, for training the text encoder or learned tokens."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...text.encoder import TextEncoder, encode_tokens
from ...text.learned_tokens import TokenTable

Names = Mapping[str, Sequence[int]]


class TrainableText:
    """Encodes captions by id; they are tokenised once, into the chunks of `TextEncoder.encode`, and prompt weights
    are ignored.

    encoder    on its device
    names      of learned tokens in captions, with the ids of their vectors
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
        self.tokens = [self._chunks(caption) for caption in captions]
        self.empty = self._chunks("")

    def __call__(self, caption_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) on the CPU -> states (B, 77·n, C), n the chunks of the longest; pooled (B, P), of the first chunk"""
        return self._encode([self.tokens[i] for i in caption_ids.tolist()])

    def of(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States and pooled states of other texts."""
        return self._encode([self._chunks(text) for text in texts])

    def _chunks(self, text: str) -> Tensor:
        """(n, 77) ids"""
        chunks = self.encoder.tokenizer.chunks(text, self.names)
        return torch.tensor([[token for token, _ in chunk] for chunk in chunks])

    def _encode(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encodes texts of chunks (n, 77) each; shorter texts are padded with the empty caption's chunk."""
        model, count = self.encoder.model, max(map(len, texts))
        rows = torch.stack([torch.cat([text, *[self.empty] * (count - len(text))]) for text in texts])
        tokens = self.table() if self.table is not None else None
        end = self.encoder.tokenizer.end_token
        states, pooled = encode_tokens(model, rows.flatten(0, 1).to(model.device), end, tokens)
        return states.unflatten(0, (len(texts), count)).flatten(1, 2), pooled[::count]
