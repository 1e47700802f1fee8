"""Learned tokens of adapters for a given text encoder, under the names that prompts call them by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CascadeError, printable, quoted
from ..text.learned_tokens import LearnedToken
from .adapter import Adapter
from .compatibility import check_finite_token
from .patterns import MOST_TEXTS, texts

MOST_TOKENS = 100  # named by one adapter's node


class NewToken(NamedTuple):
    """A token that the published training added to the vocabulary. Its row began as the mean of all tokens whose
    spelling matches the pattern ("^dog</w>", read by `patterns.texts`), or as zeros.
    """

    name: str
    pattern: str | None = None


def parse_new_tokens(text: str) -> tuple[NewToken, ...]:
    """Name and pattern of each, "[fernando] ^dog</w>; [rex]", in the order of the published `train_tokens`.

    Raises CascadeError for more than MOST_TOKENS: each pattern is searched for in the whole vocabulary.
    """
    entries = [entry.strip() for entry in re.split(r"[;\n]", text) if entry.strip()]
    if len(entries) > MOST_TOKENS:
        raise CascadeError(
            f"new_tokens names {len(entries)} tokens; give at most {MOST_TOKENS}, those that are used."
        )
    return tuple(NewToken(*entry.split(maxsplit=1)) for entry in entries)


def name_in_prompt(name: str) -> str:
    """The name in brackets, its own or square ones, so that a token named like a word does not replace the word."""
    return name if name[:1] + name[-1:] in ("[]", "<>") else f"[{name}]"


def taught_tokens(
    adapter: Adapter,
    strength: float,
    vocabulary: Mapping[str, int],
    embedding: Tensor,
    new: Sequence[NewToken] = (),
) -> tuple[LearnedToken, ...]:
    """The tokens that an adapter teaches a text encoder; changes of rows are multiplied by `strength`.

    vocabulary  {spelling: token}
    embedding   (tokens, C), the encoder's own
    new         names of the adapter's tokens numbered after the vocabulary; tokens without a name are left out

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
        check_finite_token(token, adapter.name)
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
    alternatives = texts(pattern)
    if alternatives is None or len(alternatives) > MOST_TEXTS:  # each is searched for in every token
        raise CascadeError(
            f"The pattern {quoted(pattern)} of {printable(name)} is not one of those that are read: at most "
            f"{MOST_TEXTS} words, with |, ^, $ and ? such as ^dog</w>; write it so."
        )
    tokens = [
        token for spelling, token in vocabulary.items() if any(text.is_in(spelling) for text in alternatives)
    ]
    if not tokens:
        raise CascadeError(
            f"No token of the vocabulary matches {quoted(pattern)} of {printable(name)}; write the pattern that "
            "it was trained with, such as ^dog</w>."
        )
    return embedding[tokens].float().cpu().mean(dim=0, keepdim=True)
