"""Training data: scenes with their pictures, drawn on the accelerator, and their captions, tokenised."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from os import cpu_count, environ
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.geometry import compressor_size
from cascade_nodes.cascade_core.text.tokenizer import CHUNK_LENGTH, Tokenizer
from cascade_nodes.demo.places import captioned, contrasted
from cascade_nodes.demo.recipe import PICTURE
from cascade_nodes.demo.scenes import BACKGROUNDS, MARGIN, SceneTable, held_out_reason
from cascade_nodes.demo.wide_pictures import wide_pictures
from cascade_nodes.demo.world import Packed, Scene, pack, render

Size = tuple[int, int]  # height and width in pixels
Scenes = Sequence[Scene] | SceneTable
Words = Callable[[Any, Random], list[str]]  # of a scene, or of other data that captions describe
EDIT_MARGIN = 0.035  # around an object that is replaced, as a share of the frame
AT_ONCE = 1024  # pictures that are resized together


def pictures(
    scenes: Scenes | Packed, device: torch.device, size: int | Size = PICTURE, smaller: int | None = None
) -> Tensor:
    """Renders scenes: uint8 (N, 3, *size), or resized to `smaller` after drawing."""
    packed = scenes if isinstance(scenes, Packed) else pack(scenes)
    batches = []
    for start in range(0, len(packed.shape), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        images = render(packed.rows(rows, device), size, device, _chunk(device))
        batches.append(images if smaller is None else shrunk(images, smaller))
    return torch.cat(batches).contiguous(memory_format=torch.channels_last)


def wide(count: int, seed: int, device: torch.device, size: int | Size = PICTURE) -> Tensor:
    """Pictures of any colours, shapes and places, except held-out combinations: uint8 (N, 3, *size)"""
    return wide_pictures(count, size, torch.Generator(device).manual_seed(seed), device, _chunk(device))


def _chunk(device: torch.device) -> int:
    """Pictures that are drawn at a time."""
    return 512 if device.type == "cuda" else 128


def alone(table: SceneTable, slot: int, seed: int) -> SceneTable:
    """One object of each scene, alone anywhere on a background; half of them keep their scene's."""
    rng = np.random.default_rng([seed, slot])
    n, low = len(table.kind), MARGIN + table.radius[:, slot, None]
    background = np.where(rng.random(n) < 0.5, table.background, rng.integers(0, len(BACKGROUNDS), n))
    return SceneTable(
        table.kind[:, slot : slot + 1],
        table.size[:, slot : slot + 1],
        (low + (1 - 2 * low) * rng.random((n, 2)))[:, None],
        table.radius[:, slot : slot + 1],
        np.full(n, -1),
        background,
        np.ones(n),
    )


def edited(table: SceneTable, seed: int) -> tuple[SceneTable, Tensor]:
    """The scenes with their last object replaced by another of the same size, and masks (N, 256, 256) of that object.

    A scene that would then show a held-out combination, or the same object twice, is not changed.
    """
    rng = np.random.default_rng([seed, 9])
    rows = np.arange(len(table.kind))
    last = (table.kind >= 0).sum(1) - 1
    kind = table.kind.copy()
    kind[rows, last] = rng.permutation(table.kind[rows, last])
    changed = table._replace(kind=kind)
    for row, scene in enumerate(changed.scenes()):
        twins = len({(o.shape, o.colour) for o in scene.objects}) < len(scene.objects)
        if twins or held_out_reason(scene) is not None:
            changed.kind[row] = table.kind[row]
    centre, reach = table.centre[rows, last], table.radius[rows, last] + EDIT_MARGIN
    place = (np.arange(PICTURE) + 0.5) / PICTURE
    across, down = (np.abs(place - centre[:, axis, None]) < reach[:, None] for axis in (0, 1))
    return changed, torch.from_numpy(down[:, :, None] & across[:, None, :]).float()


def shrunk(images: Tensor, size: int) -> Tensor:
    """uint8 pictures, resized: uint8 (N, 3, size, size)"""
    return torch.cat([to_uint8(resized(as_float(part), size)) for part in images.split(AT_ONCE)])


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
    """uint8 pictures (N, 3, H, W) -> float, resized to the compressor's input."""
    return resized(as_float(images), compressor_size(*images.shape[-2:]))


def _one_by_one(scenes: Sequence[Any] | SceneTable) -> Sequence[Any]:
    return scenes.scenes() if isinstance(scenes, SceneTable) else scenes


def _count(scenes: Sequence[Any] | SceneTable) -> int:
    return len(scenes.kind) if isinstance(scenes, SceneTable) else len(scenes)


def _caption_scenes(scene: Scene, rng: Random, count: int) -> list[str]:
    return [captioned(scene, rng) for _ in range(count)]


def _write(job: tuple[int, Sequence[Any] | SceneTable], words: Words, tokenizer: Tokenizer) -> np.ndarray:
    """The words of some scenes, as tokens: (texts, 77)"""
    number, scenes = job
    rng = Random(number)
    texts = [text for scene in _one_by_one(scenes) for text in words(scene, rng)]
    return tokenise(texts, tokenizer).numpy()


def write_words(words: Words, scenes: Sequence[Any] | SceneTable, tokenizer: Tokenizer, seed: int) -> Tensor:
    """The words of all scenes, as tokens, by every core: (texts, 77); the number of cores does not matter."""
    parts = (slice(start, start + 2000) for start in range(0, _count(scenes), 2000))
    jobs = [
        (seed + part.start, scenes.rows(part) if isinstance(scenes, SceneTable) else scenes[part])
        for part in parts
    ]
    write = partial(_write, words=words, tokenizer=tokenizer)
    if len(jobs) == 1:
        return torch.from_numpy(write(jobs[0]))
    with ProcessPoolExecutor(min(cpu_count() or 1, len(jobs)), initializer=_one_thread) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(write, jobs))))


def _one_thread() -> None:
    environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def captions(scenes: Scenes, count: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """`count` random captions of every scene, as tokens: int16 (N, count, 77)."""
    tokens = write_words(partial(_caption_scenes, count=count), scenes, tokenizer, seed)
    return tokens.view(_count(scenes), count, CHUNK_LENGTH)


def contrasts(scenes: Scenes, negatives: int, tokenizer: Tokenizer, seed: int) -> Tensor:
    """`contrasted` captions of every scene, as tokens: int16 (N, 2 + negatives, 77)."""
    tokens = write_words(partial(contrasted, count=negatives), scenes, tokenizer, seed)
    return tokens.view(_count(scenes), 2 + negatives, CHUNK_LENGTH)


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
