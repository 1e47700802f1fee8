"""Cache of captions' text states: each distinct caption is encoded once, then the text encoder can be released."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CascadeError, quoted
from ...text.encoder import TextEncoder, TextStates
from ...text.tokenizer import CHUNK_LENGTH
from ..processes import Processes
from .cache import Cache, fingerprint, key_of
from .exchange import exchange

ENCODED_AT_ONCE = 256  # captions, and in a file of the cache
CHUNKS_AT_ONCE = 4096  # in one batch of longer captions: 1.5 GB


class TextCache:
    """Cache of TextEncoder.encode for captions, in memory or, with a folder, in mapped files.

    States are kept in float16, whose 11 significant bits suffice, since training multiplies in bfloat16, which has 8.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None):
        self.encoder: TextEncoder | None = encoder
        if folder is None:
            self.cache = Cache(None, "")
        else:
            mark = key_of(fingerprint(encoder.model), encoder.tokenizer.backend.to_str()).hex()
            self.cache = Cache(Path(folder).expanduser() / "text", mark)
        self.config = encoder.model.config
        self.fill([""])  # padding of shorter captions

    def fill_together(
        self, captions: Sequence[str], processes: Processes, ask: Callable[[], None] = lambda: None
    ) -> None:
        """`fill` by several processes, each of which encodes its share and receives the others'."""
        distinct = list(dict.fromkeys(captions))
        rank, ranks = processes.process_index, processes.num_processes
        processes.on_each(lambda: self.fill(distinct[rank::ranks], ask=ask))
        keys = [key_of(part, text) for text in distinct for part in TextStates._fields]
        exchange(self.cache, keys, processes)
        processes.on_each(lambda: self.fill(distinct, ask=ask))

    def fill(
        self,
        captions: Sequence[str],
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
    ) -> None:
        """Encodes captions that are not cached yet; report: called with the number encoded so far and in total.

        ask: called before each group of captions; raises Interrupted to end the run.
        """
        missing = [text for text in dict.fromkeys(captions) if text not in self]
        if missing and self.encoder is None:
            raise CascadeError(
                f"The caption {quoted(missing[0])} was not encoded before the text encoder was let go; give all "
                "captions to `fill`."
            )
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            part = missing[start : start + ENCODED_AT_ONCE]
            self._encode(part, ask)
            if report is not None:
                report(start + len(part), len(missing))

    def __contains__(self, caption: str) -> bool:
        states, pooled = (self.cache.rows.get(key_of(part, caption)) for part in TextStates._fields)
        if (
            states is None
            or pooled is None
            or states.ndim != 2
            or len(states) % CHUNK_LENGTH
            or not len(states)
        ):
            return False  # the last three: a damaged file
        width, projected = self.config.hidden_size, self.config.projection_dim
        return states.shape[1:] == (width,) and pooled.shape == (projected,) and states.dtype == torch.float16

    def _encode(self, captions: Sequence[str], ask: Callable[[], None]) -> None:
        assert self.encoder is not None
        by_length: dict[int, list[str]] = {}  # by number of chunks, so that none is padded
        for text in captions:
            by_length.setdefault(len(self.encoder.tokenizer.chunks(text)), []).append(text)
        for chunks, all_texts in by_length.items():
            at_once = max(CHUNKS_AT_ONCE // chunks, 1)
            for texts in (all_texts[i : i + at_once] for i in range(0, len(all_texts), at_once)):
                ask()
                for part, rows in self.encoder.encode(texts)._asdict().items():
                    self.cache.add([key_of(part, text) for text in texts], rows.half())

    def release(self) -> None:
        """Releases the encoder's memory."""
        self.encoder = None

    def states(self, captions: Sequence[str]) -> TextStates:
        """states (B, 77·n, C), n the chunks of the longest; pooled (B, P). Both float32, on the CPU."""
        with torch.autocast("cpu", enabled=False):  # which takes no fp16
            return self._states(captions)

    def _states(self, captions: Sequence[str]) -> TextStates:
        self.fill(captions)
        rows = [self.cache.rows[key_of("states", text)] for text in captions]
        longest = max(map(len, rows))
        empty = self.cache.rows[key_of("states", "")]
        padded = [_padded(row, empty, longest) for row in rows]
        pooled = self.cache.stack(key_of("pooled", text) for text in captions)
        return TextStates(torch.stack(padded).float(), pooled.float())


def _padded(row: Tensor, empty: Tensor, length: int) -> Tensor:
    """Pads the states of a caption with those of the empty caption up to `length`."""
    return row if len(row) == length else torch.cat([row, *[empty] * ((length - len(row)) // len(empty))])
