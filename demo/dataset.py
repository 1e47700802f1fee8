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
    """Renders scenes: uint8 (N, 3, size, size), or resized to `smaller` after drawing."""
    batches = []
    for start in range(0, len(scenes), 4096):
        images = render(pack(scenes[start : start + 4096]), size, device)
        batches.append(images if smaller is None else to_uint8(resized(as_float(images), smaller)))
    return torch.cat(batches).contiguous(memory_format=torch.channels_last)


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
    """uint8 pictures -> float (N, 3, side, side) at the compressor's size."""
    return resized(as_float(images), COMPRESSED)


def _caption_scenes(numbered: tuple[int, Sequence[Scene]], count: int) -> list[str]:
    number, scenes = numbered
    rng = Random(number)
    return [caption(scene, rng) for scene in scenes for _ in range(count)]


def _contrast_scenes(numbered: tuple[int, Sequence[Scene]], count: int) -> list[str]:
    number, scenes = numbered
    rng = Random(number)
    texts = []
    for scene in scenes:
        right, wrong = contrast(scene, rng, count)
        texts += [right, *wrong]
    return texts


def _in_parallel(work, scenes: Sequence[Scene], seed: int) -> list[str]:
    """Runs work((seed, some scenes)) over all scenes, in order, on every core; the number of cores does not matter."""
    jobs = [(seed + start, scenes[start : start + 5000]) for start in range(0, len(scenes), 5000)]
    with ProcessPoolExecutor(min(cpu_count() or 1, len(jobs))) as pool:
        return [text for texts in pool.map(work, jobs) for text in texts]


def captions(scenes: Sequence[Scene], count: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """`count` random captions of every scene, as tokens: int16 (N, count, 77)."""
    texts = _in_parallel(partial(_caption_scenes, count=count), scenes, seed)
    return tokenise(texts, tokenizer).view(len(scenes), count, CHUNK_LENGTH)


def contrasts(scenes: Sequence[Scene], negatives: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """Captions of every scene and `negatives` false ones in similar words: int16 (N, 1 + negatives, 77)."""
    texts = _in_parallel(partial(_contrast_scenes, count=negatives), scenes, seed)
    return tokenise(texts, tokenizer).view(len(scenes), 1 + negatives, CHUNK_LENGTH)


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Tokenises plain texts, no longer than a chunk, without weights: int16 (N, 77), padded with the end token."""
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
