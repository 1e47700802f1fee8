"""Learned tokens: rows that stand in a prompt for a name, and changes of tokens that the vocabulary has.

The text encoder's embedding matrix is neither copied nor written to: learned rows are numbered behind its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CascadeError
from .adapter import Adapter, LearnedToken

METADATA_KEY = "train_tokens"  # where a file names its new tokens, as JSON, by the published setting's name


class TokenTable:
    """Learned tokens numbered from `first` on, the size of a vocabulary of `width` columns.

    ids  {name: its tokens}, for `Tokenizer.chunks`. Of two tokens of one name the later counts.

    Changes of one token add up. Differentiable in the tokens' vectors.
    """

    def __init__(self, tokens: Sequence[LearnedToken], first: int, width: int):
        named = {token.name: token for token in tokens if token.index is None}
        self.first = first
        self.rows = torch.cat([t.vectors for t in named.values()] or [torch.empty(0, width)])  # (K, C)
        at_output = [[t.output] for t in named.values() for _ in t.vectors]
        self.at_output = torch.tensor(at_output, dtype=torch.bool, device=self.rows.device)  # (K, 1)
        self.ids: dict[str, range] = {}
        for name, token in named.items():
            self.ids[name] = range(first, first + len(token.vectors))
            first += len(token.vectors)
        self.changes: dict[int, Tensor] = {}
        for token in tokens:
            if token.index is not None:
                self.changes[token.index] = self.changes.get(token.index, 0) + token.vectors[0]  # (C,)

    def known(self, tokens: Tensor) -> Tensor:
        """(N, T), the learned ones replaced by one that the vocabulary has."""
        return tokens.where(tokens < self.first, 0)

    def embed(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """What the encoder begins with, (N, T, C): tokens (N, T), and what its matrix gives for `known(tokens)`."""
        for token, change in self.changes.items():
            embedded = embedded + (tokens == token).unsqueeze(-1) * change.to(embedded)
        if not len(self.rows):
            return embedded
        rows = self.rows.masked_fill(self.at_output, 0)
        return self._at(tokens, rows.to(embedded)).where((tokens >= self.first).unsqueeze(-1), embedded)

    def output(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The encoder's states (N, T, C) with the rows that were learned there."""
        if not self.at_output.any():
            return states
        here = (tokens >= self.first).unsqueeze(-1) & self._at(tokens, self.at_output.to(tokens.device))
        return self._at(tokens, self.rows.to(states)).where(here, states)

    def _at(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """(N, T) -> (N, T, C): each learned token's row, any where the vocabulary has it."""
        return rows[(tokens - self.first).clamp(min=0)]


class NewToken(NamedTuple):
    """A token that the published training added to the vocabulary; its row began as the mean of all tokens in whose
    spelling the pattern, a regular expression, is found ("^dog</w>"), or as zeros.
    """

    name: str
    pattern: str | None = None


def parse_new_tokens(text: str) -> tuple[NewToken, ...]:
    """The new tokens of the published setting `train_tokens`, in its order.

    text: a line for each, its name and its pattern ("[fernando] ^dog</w>"), or the setting itself as JSON
    ('[["[fernando]", "^dog</w>"]]'), whose entries for tokens of the vocabulary are left out.
    """
    entries: list[Any] = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("[["):
        try:
            entries = json.loads(text)
        except ValueError:
            entries = [[None]]
    tokens = []
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) in (1, 2) and isinstance(entry[0], str)):
            raise CascadeError(
                f'{text!r} names no new tokens; write a line such as "[fernando] ^dog</w>" for each.'
            )
        if entry[0][:1] + entry[0][-1:] in ("[]", "<>"):
            tokens.append(NewToken(*entry))
    return tuple(tokens)


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
        if token.index is None:
            taught.append(token)
        elif token.index < size:
            taught.append(replace(token, vectors=strength * token.vectors))
        elif token.index - size < len(new):
            name, pattern = new[token.index - size]
            base = _mean_row(name, pattern, vocabulary, embedding)
            taught.append(LearnedToken(name, base + strength * token.vectors))
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
