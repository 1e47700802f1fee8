"""Captions' states, each distinct caption encoded once; afterwards the text encoder can be let go."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CascadeError
from ..text import TextEncoder, TextStates
from .cache import Cache, fingerprint, key_of

ENCODED_AT_ONCE = 256  # captions, and in a file of the cache


class TextCache:
    """states(captions) as TextEncoder.encode gives them, from memory or, with a folder, from mapped files.

    Kept in half precision, which holds a value to 11 bits; bfloat16, in which training multiplies, has 8.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None):
        self.encoder: TextEncoder | None = encoder
        held = Path(folder).expanduser() / "text" if folder is not None else None
        mark = fingerprint(encoder.model) if held is not None else ""
        self.cache = Cache(held, mark)
        self.fill([""])  # what shorter captions are followed by

    def fill(self, captions: Sequence[str]) -> None:
        """Encodes those that are not there yet."""
        missing = [text for text in dict.fromkeys(captions) if _key("pooled", text) not in self.cache]
        if not missing:
            return
        if self.encoder is None:
            raise CascadeError(
                f"The caption {missing[0]!r} was not encoded before the text encoder was let go; give "
                "all captions to fill."
            )
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            self._encode(self.encoder, missing[start : start + ENCODED_AT_ONCE])

    def _encode(self, encoder: TextEncoder, captions: Sequence[str]) -> None:
        by_length: dict[int, list[str]] = {}
        for text in captions:
            by_length.setdefault(len(encoder.tokenizer.chunks(text)), []).append(text)
        for texts in by_length.values():
            states, pooled = encoder.encode(texts)
            self.cache.add([_key("states", text) for text in texts], states.half())
            self.cache.add([_key("pooled", text) for text in texts], pooled.half())

    def release(self) -> None:
        """Lets the encoder go."""
        self.encoder = None

    def states(self, captions: Sequence[str]) -> TextStates:
        """states (B, 77·n, C), n the chunks of the longest; pooled (B, P). Both float32, on the CPU."""
        self.fill(captions)
        rows = [self.cache.rows[_key("states", text)] for text in captions]
        longest = max(len(row) for row in rows)
        empty = self.cache.rows[_key("states", "")]
        padded = [
            row if len(row) == longest else torch.cat([row, *[empty] * ((longest - len(row)) // len(empty))])
            for row in rows
        ]
        return TextStates(torch.stack(padded).float(), self._pooled(captions).float())

    def _pooled(self, captions: Sequence[str]) -> Tensor:
        return self.cache.stack(_key("pooled", text) for text in captions)


def _key(part: str, caption: str) -> bytes:
    return key_of(part, caption)
