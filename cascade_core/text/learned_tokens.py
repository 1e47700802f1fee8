"""Learned tokens: embedding rows for a name in a prompt, and changes of tokens in the vocabulary.

The text encoder's embedding matrix is neither copied nor written to: learned rows are numbered after its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LearnedToken:
    """A token as an adapter or an embedding file defines it.

    name      in the prompt, such as "[fernando]"; "" for a change of a token in the vocabulary
    vectors   (V, C) float32: one or more rows, which stand in the prompt one after the other
    index     the vocabulary's token that `vectors` (one row) is added to; None for a token of its own
    output    whether the rows stand in place of the encoder's states at the token's positions (OneTrainer's "output
              embedding") instead of its input's
    """

    name: str
    vectors: Tensor
    index: int | None = None
    output: bool = False


class TokenTable:
    """Learned tokens, numbered from `first` on, the size of the vocabulary. width: columns of its embeddings.

    ids  {name: its tokens}, for `Tokenizer.chunks`. Of two tokens with one name, the later counts; but rows for the
         encoder's input and rows for its output are combined.

    Changes of one token add up. Differentiable in the tokens' vectors.
    """

    def __init__(self, tokens: Sequence[LearnedToken], first: int, width: int):
        self.first = first
        self.changes: dict[int, Tensor] = {}
        named: dict[str, dict[bool, Tensor]] = {}  # at the output or not -> rows
        for token in tokens:
            if token.index is None:
                named.setdefault(token.name, {})[token.output] = token.vectors
            else:
                self.changes[token.index] = self.changes.get(token.index, 0) + token.vectors[0]  # (C,)
        self.ids: dict[str, range] = {}
        for name, rows in named.items():
            count = max(map(len, rows.values()))
            self.ids[name] = range(first, first + count)
            first += count
        self.inputs = self._rows(named, False, 0.0, width)
        self.outputs = self._rows(named, True, torch.nan, width)

    def _rows(
        self, named: Mapping[str, Mapping[bool, Tensor]], output: bool, absent: float, width: int
    ) -> Tensor:
        """(K, C): the rows for the input, or for the output; `absent` for tokens without such rows."""
        rows = [torch.empty(0, width)]
        for name, ends in named.items():
            learned = ends.get(output, next(iter(ends.values()))[:0])
            rows.append(F.pad(learned, (0, 0, 0, len(self.ids[name]) - len(learned)), value=absent))
        return torch.cat(rows[1:] or rows)

    def in_vocabulary(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) in which a token of the vocabulary replaces the learned ones."""
        return tokens.where(tokens < self.first, 0)

    def embed(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """Input embeddings (N, T, C) with changed and learned rows.

        tokens: (N, T); embedded: (N, T, C), the matrix's rows for `in_vocabulary(tokens)`.
        """
        for token, change in self.changes.items():
            embedded = embedded + (tokens == token).unsqueeze(-1) * change.to(embedded)
        return self._put(tokens, self.inputs, embedded)

    def output(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The encoder's states (N, T, C) with the rows that were learned there."""
        return states if self.outputs.isnan().all() else self._put(tokens, self.outputs, states)

    def _put(self, tokens: Tensor, rows: Tensor, into: Tensor) -> Tensor:
        """Puts each learned token's row, except where it is NaN, at its positions of (N, T, C)."""
        if not len(rows):
            return into
        learned = rows.to(into)[(tokens - self.first).clamp(min=0)]
        return learned.where((tokens >= self.first).unsqueeze(-1) & ~learned.isnan(), into)
