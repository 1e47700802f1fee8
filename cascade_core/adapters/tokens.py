"""Learned tokens: rows that stand in a prompt for a name, and changes of tokens that the vocabulary has.

The text encoder's embedding matrix is neither copied nor written to: learned rows are numbered behind its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CascadeError
from .adapter import Adapter, LearnedToken


class TokenTable:
    """Learned tokens numbered from `first` on, the size of a vocabulary of `width` columns.

    ids  {name: its tokens}, for `Tokenizer.chunks`. Of two tokens of one name the later counts; what one learned at the
         encoder's input and another at its output go together.

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
        """(K, C): those learned at the one end, `absent` for the others."""
        rows = [torch.empty(0, width)]
        for name, ends in named.items():
            there = ends.get(output, next(iter(ends.values()))[:0])
            rows.append(F.pad(there, (0, 0, 0, len(self.ids[name]) - len(there)), value=absent))
        return torch.cat(rows[1:] or rows)

    def known(self, tokens: Tensor) -> Tensor:
        """(N, T), the learned ones replaced by one that the vocabulary has."""
        return tokens.where(tokens < self.first, 0)

    def embed(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """What the encoder begins with, (N, T, C): tokens (N, T), and what its matrix gives for `known(tokens)`."""
        for token, change in self.changes.items():
            embedded = embedded + (tokens == token).unsqueeze(-1) * change.to(embedded)
        return self._put(tokens, self.inputs, embedded)

    def output(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The encoder's states (N, T, C) with the rows that were learned there."""
        return states if self.outputs.isnan().all() else self._put(tokens, self.outputs, states)

    def _put(self, tokens: Tensor, rows: Tensor, into: Tensor) -> Tensor:
        """Each learned token's row, but for NaN, in its places of (N, T, C)."""
        if not len(rows):
            return into
        learned = rows.to(into)[(tokens - self.first).clamp(min=0)]
        return learned.where((tokens >= self.first).unsqueeze(-1) & ~learned.isnan(), into)


class NewToken(NamedTuple):
    """A token that the published training added to the vocabulary; its row began as the mean of all tokens in whose
    spelling the pattern, a regular expression, is found ("^dog</w>"), or as zeros.
    """

    name: str
    pattern: str | None = None


def parse_new_tokens(text: str) -> tuple[NewToken, ...]:
    """Name and pattern of each, "[fernando] ^dog</w>; [rex]", in the order of the published `train_tokens`."""
    return tuple(
        NewToken(*entry.strip().split(maxsplit=1)) for entry in re.split(r"[;\n]", text) if entry.strip()
    )


def name_in_prompt(name: str) -> str:
    """A name in brackets, its own or square ones: a token that is called as a word must not take the word's place."""
    return name if name[:1] + name[-1:] in ("[]", "<>") else f"[{name}]"


def taught_tokens(
    adapter: Adapter,
    strength: float,
    vocabulary: Mapping[str, int],
    embedding: Tensor,
    new: Sequence[NewToken] = (),
) -> tuple[LearnedToken, ...]:
    """What an adapter teaches a text encoder, at a strength: what it adds to rows is multiplied by it.

    vocabulary  {spelling: token}
    embedding   (tokens, C), the encoder's own
    new         the adapter's tokens behind the vocabulary; such as are not named here are left out

    Raises CascadeError for rows of another width.
    """
    size, width = embedding.shape
    taught = []
    for token in adapter.tokens if strength else ():
        if token.vectors.shape[-1] != width:
            raise CascadeError(
                f"{adapter.name} teaches a token {token.vectors.shape[-1]} wide, but the text encoder's are {width}; "
                "choose the file that was trained with this text encoder."
            )
        if not torch.isfinite(token.vectors).all():
            raise CascadeError(f"{adapter.name} holds NaN or infinity in a learned token; download it again.")
        if token.index is None:
            taught.append(replace(token, name=name_in_prompt(token.name)))
        elif token.index < size:
            taught.append(replace(token, vectors=strength * token.vectors))
        elif token.index - size < len(new):
            name, pattern = new[token.index - size]
            base = _mean_row(name, pattern, vocabulary, embedding)
            taught.append(LearnedToken(name_in_prompt(name), base + strength * token.vectors))
    return tuple(taught)


def _mean_row(name: str, pattern: str | None, vocabulary: Mapping[str, int], embedding: Tensor) -> Tensor:
    if pattern is None:
        return torch.zeros(1, embedding.shape[1])
    try:
        found = [token for spelling, token in vocabulary.items() if re.search(pattern, spelling)]
    except re.error as error:
        raise CascadeError(
            f"The pattern {pattern!r} of {name} is no regular expression ({error}); write one such as ^dog</w>."
        ) from None
    if not found:
        raise CascadeError(
            f"No token of the vocabulary matches {pattern!r} of {name}; write the pattern that it was trained with, "
            "such as ^dog</w>."
        )
    return embedding[found].float().cpu().mean(dim=0, keepdim=True)
