"""Captions' states, each distinct caption encoded once; afterwards the text encoder can be released."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CascadeError
from ...text.encoder import TextEncoder, TextStates
from .cache import Cache, fingerprint, key_of

ENCODED_AT_ONCE = 256  # captions, and in a file of the cache


class TextCache:
    """states(captions) as TextEncoder.encode gives them, from memory or, with a folder, from mapped files.

    Kept in half precision, which holds a value to 11 bits; bfloat16, in which training multiplies, has 8.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None):
        self.encoder: TextEncoder | None = encoder
        if folder is None:
            self.cache = Cache(None, "")
        else:
            mark = key_of(fingerprint(encoder.model), encoder.tokenizer.backend.to_str()).hex()
            self.cache = Cache(Path(folder).expanduser() / "text", mark)
        self.fill([""])  # what shorter captions are followed by

    def fill(self, captions: Sequence[str], report: Callable[[int, int], None] | None = None) -> None:
        """Encode captions that are not cached yet; report: called with how many are encoded and how many there are."""
        missing = [text for text in dict.fromkeys(captions) if text not in self]
        if missing and self.encoder is None:
            raise CascadeError(
                f"The caption {missing[0]!r} was not encoded before the text encoder was let go; give all captions to "
                "`fill`."
            )
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            part = missing[start : start + ENCODED_AT_ONCE]
            self._encode(part)
            if report is not None:
                report(start + len(part), len(missing))

    def __contains__(self, caption: str) -> bool:
        return key_of("states", caption) in self.cache and key_of("pooled", caption) in self.cache

    def _encode(self, captions: Sequence[str]) -> None:
        assert self.encoder is not None
        by_length: dict[int, list[str]] = {}  # of one number of chunks, so that none is padded
        for text in captions:
            by_length.setdefault(len(self.encoder.tokenizer.chunks(text)), []).append(text)
        for texts in by_length.values():
            for part, rows in self.encoder.encode(texts)._asdict().items():
                self.cache.add([key_of(part, text) for text in texts], rows.half())

    def release(self) -> None:
        """Release the encoder's memory."""
        self.encoder = None

    def states(self, captions: Sequence[str]) -> TextStates:
        """states (B, 77·n, C), n the chunks of the longest; pooled (B, P). Both float32, on the CPU."""
        self.fill(captions)
        rows = [self.cache.rows[key_of("states", text)] for text in captions]
        longest = max(map(len, rows))
        empty = self.cache.rows[key_of("states", "")]
        padded = [_padded(row, empty, longest) for row in rows]
        pooled = self.cache.stack(key_of("pooled", text) for text in captions)
        return TextStates(torch.stack(padded).float(), pooled.float())


def _padded(row: Tensor, empty: Tensor, length: int) -> Tensor:
    """A caption of fewer chunks is followed by the empty caption's."""
    return row if len(row) == length else torch.cat([row, *[empty] * ((length - len(row)) // len(empty))])
