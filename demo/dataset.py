"""Training data: scenes drawn once, captioned and tokenised once, and kept on the accelerator."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from os import cpu_count
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.text.tokenizer import CHUNK_LENGTH, Tokenizer
from cascade_nodes.demo.captions import caption, contrast
from cascade_nodes.demo.recipe import COMPRESSED, PICTURE
from cascade_nodes.demo.world import Scene, pack, render


def pictures(
    scenes: Sequence[Scene], device: torch.device, size: int = PICTURE, smaller: int | None = None
) -> Tensor:
    """The scenes drawn: uint8 (N, 3, size, size), or resized to `smaller` after drawing."""
    drawn = []
    for start in range(0, len(scenes), 4096):
        images = render(pack(scenes[start : start + 4096]), size, device)
        drawn.append(images if smaller is None else to_uint8(resized(as_float(images), smaller)))
    return torch.cat(drawn).contiguous(memory_format=torch.channels_last)


def as_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]"""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """float in [0, 1] -> uint8"""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def resized(images: Tensor, size: int | Sequence[int]) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) or (B, 3, *size), bicubic with antialiasing."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)


def for_compressor(images: Tensor) -> Tensor:
    """uint8 pictures -> what the compressor reads."""
    return resized(as_float(images), COMPRESSED)


def _caption_some(numbered: tuple[int, Sequence[Scene]], each: int) -> list[str]:
    number, scenes = numbered
    rng = Random(number)
    return [caption(scene, rng) for scene in scenes for _ in range(each)]


def _contrast_some(numbered: tuple[int, Sequence[Scene]], each: int) -> list[str]:
    number, scenes = numbered
    rng = Random(number)
    texts = []
    for scene in scenes:
        right, wrong = contrast(scene, rng, each)
        texts += [right, *wrong]
    return texts


def _in_parallel(work, scenes: Sequence[Scene], seed: int) -> list[str]:
    """work((seed, some scenes)) over all scenes, in order, on every core; the same whatever the number of cores."""
    parts = [(seed + start, scenes[start : start + 5000]) for start in range(0, len(scenes), 5000)]
    with ProcessPoolExecutor(min(cpu_count() or 1, len(parts))) as pool:
        return [text for part in pool.map(work, parts) for text in part]


def captions(scenes: Sequence[Scene], each: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """`each` random captions of every scene, as tokens: int16 (N, each, 77)."""
    texts = _in_parallel(partial(_caption_some, each=each), scenes, seed)
    return tokenise(texts, tokenizer).view(len(scenes), each, CHUNK_LENGTH)


def contrasts(scenes: Sequence[Scene], wrong: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """A caption of every scene and then `wrong` false ones in like words: int16 (N, 1 + wrong, 77)."""
    texts = _in_parallel(partial(_contrast_some, each=wrong), scenes, seed)
    return tokenise(texts, tokenizer).view(len(scenes), 1 + wrong, CHUNK_LENGTH)


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Plain texts, no longer than a chunk, without weights -> int16 (N, 77), padded with the end token."""
    rows = np.full((len(texts), CHUNK_LENGTH), tokenizer.end_token, dtype=np.int16)
    rows[:, 0] = tokenizer.start_token
    for start in range(0, len(texts), 100_000):
        for i, encoding in enumerate(
            tokenizer.backend.encode_batch(list(texts[start : start + 100_000]), add_special_tokens=False),
            start,
        ):
            ids = encoding.ids[: CHUNK_LENGTH - 2]
            rows[i, 1 : 1 + len(ids)] = ids
    return torch.from_numpy(rows)
