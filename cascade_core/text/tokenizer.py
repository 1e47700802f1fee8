"""CLIP's tokenizer, and the 77-token chunks that a prompt is cut into, as ComfyUI cuts them.

The rules are CLIP's (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", section 2.4); the `tokenizers` library does the merging.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CascadeError, printable
from .prompt_weights import parse_weights
from .vocabulary import (
    END,
    START,
    Merges,
    build_small_vocabulary,
    bundled_vocabulary,
    byte_pair_backend,
    read_tokenizer,
    read_vocabulary,
    save_vocabulary,
)

if TYPE_CHECKING:
    import tokenizers

__all__ = ["CHUNK_LENGTH", "Chunk", "Tokenizer", "build_small_vocabulary", "save_vocabulary"]

CHUNK_LENGTH = 77
BREAKABLE = 8  # a segment of this many tokens may be cut at a chunk's end; a shorter one moves to the next
EMBEDDING_NAME = r"(?<=\s)(?=embedding:)"  # a segment begins at each embedding's name
EMBEDDING_SPACE = r"^(embedding:)\s+"  # and takes the first word after the colon and any spaces

Chunk = list[tuple[int, float]]


class Tokenizer:
    """Prompts -> chunks of (token, weight), equal to those of ComfyUI's Stable Cascade tokenizer.

    words: those that its text encoder was taught, if the file states them; empty: all words are known
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.length = CHUNK_LENGTH
        self.words: tuple[str, ...] = ()
        self.start_token = _special_token(backend, START)
        self.end_token = _special_token(backend, END)

    @classmethod
    def bundled(cls) -> Tokenizer:
        """CLIP's own vocabulary of 49,408 tokens, which ships with the package."""
        return cls.from_vocabulary(*bundled_vocabulary())

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[str, int], merges: Merges) -> Tokenizer:
        """Any vocabulary in CLIP's format. Raises CascadeError where the merges do not fit it."""
        try:
            return cls(byte_pair_backend(vocabulary, merges))
        except CascadeError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise CascadeError(
                f"The tokenizer's merges do not fit its vocabulary ({printable(str(error))}); expected vocab.json and "
                "merges.txt of the same model. Copy both again."
            ) from error

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads `vocab.json` and `merges.txt`, or `tokenizer.json`, from a model's folder."""
        folder = Path(path)
        vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
        if vocabulary.is_file() and merges.is_file():
            return cls.from_vocabulary(*read_vocabulary(vocabulary, merges))
        if whole.is_file():
            return cls.from_vocabulary(*read_tokenizer(whole))
        raise CascadeError(
            f"{folder} holds no tokenizer; expected vocab.json and merges.txt, or tokenizer.json. "
            "Copy them from where the text encoder came from."
        )

    def table(self) -> dict[str, Any]:
        """The table in `tokenizer.json` with the vocabulary and the merges."""
        model = json.loads(self.backend.to_str())["model"]
        return {"model": {name: model[name] for name in ("vocab", "merges")}}

    def __len__(self) -> int:
        """Number of tokens, the special ones included."""
        return self.backend.get_vocab_size()

    def tokens(self, text: str) -> list[int]:
        """Plain text -> token ids, with neither weights nor start, end and padding."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def names(self, tokens: Iterable[int]) -> list[str | None]:
        """Spelling of tokens in the vocabulary: `[320, 2368] -> ["a</w>", "cat</w>"]`; None for one not in it."""
        return [self.backend.id_to_token(token) for token in tokens]

    def empty_chunk(self) -> Chunk:
        """The chunk of the empty prompt: start, end, padding."""
        return self._close([(self.start_token, 1.0)])

    def chunks(self, prompt: str, learned: Mapping[str, Sequence[int]] | None = None) -> list[Chunk]:
        """A prompt -> one or more chunks of 77 (token, weight): start, text, end, padded with the end token.

        learned: names in the prompt with tokens that are not in the vocabulary, `{"[fernando]": [49408]}`, or with no
        tokens at all.

        A segment (a run of text under one weight, or a learned name) that does not fit begins the next chunk if
        it has fewer than 8 tokens, and is cut otherwise.
        """
        chunks = []
        chunk = [(self.start_token, 1.0)]
        room = self.length - 1  # the last place is the end token's
        for segment in self._segments(prompt, learned or {}):
            breakable = len(segment) >= BREAKABLE
            while len(chunk) + len(segment) > room:
                cut = room - len(chunk) if breakable else 0
                chunks.append(self._close(chunk + segment[:cut]))
                chunk, segment = [(self.start_token, 1.0)], segment[cut:]
            chunk += segment
        return [*chunks, self._close(chunk)]

    def _segments(self, prompt: str, learned: Mapping[str, Sequence[int]]) -> list[Chunk]:
        return [
            [(token, weight) for token in tokens]
            for run, weight in parse_weights(prompt)
            for text in re.split(EMBEDDING_NAME, run)
            for tokens in self._pieces(re.sub(EMBEDDING_SPACE, r"\1", text), learned)
        ]

    def _pieces(self, text: str, learned: Mapping[str, Sequence[int]]) -> list[Sequence[int]]:
        """The tokens of each learned name in a text, and of the text between them."""
        if not learned:
            return [self.tokens(text)] if text else []
        names = {name.lower(): tokens for name, tokens in learned.items()} | dict(learned)
        pieces: list[Sequence[int]] = []
        for part in re.split(learned_names(learned), text):
            tokens = names.get(part, names.get(part.lower()))  # empty for a name that is left out
            pieces.append(self.tokens(part) if tokens is None else tokens)
        return pieces

    def _close(self, chunk: Chunk) -> Chunk:
        return chunk + [(self.end_token, 1.0)] * (self.length - len(chunk))


def learned_names(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, in any case but not within a word; the longer ones first."""
    alternatives = []
    for name in sorted(names, key=len, reverse=True):
        before = r"(?<!\w)" if re.match(r"\w", name) else ""
        after = r"(?!\w)" if re.search(r"\w$", name) else ""
        alternatives.append(before + re.escape(name) + after)
    return re.compile(f"({'|'.join(alternatives)})", re.IGNORECASE)


def _special_token(backend: tokenizers.Tokenizer, name: str) -> int:
    token = backend.token_to_id(name)
    if token is None:
        raise CascadeError(
            f"The tokenizer lacks {name}; expected a CLIP vocabulary, which has {START} and {END}."
        )
    return token
