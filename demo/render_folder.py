"""Toy-world pictures with captions as files, for `cascade train`: `python -m cascade_nodes.demo.render_folder OUT`.

PNG files with a text file each (one caption a line), or webdataset tars. The number of cores does not matter.
"""

import argparse
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.writing import check_folder, write_file
from cascade_nodes.demo.captions import caption
from cascade_nodes.demo.recipe import PICTURE
from cascade_nodes.demo.world import Scene, render, sample_scenes

TOGETHER = 250  # pictures that a process draws and writes at a time
T = TypeVar("T")
TRIES = 10  # attempts to draw a caption that differs from the earlier ones


class Captioned(NamedTuple):
    """Scene with its captions."""

    scene: Scene
    captions: Sequence[str]


def captions_of(scene: Scene, count: int, rng: Random) -> list[str]:
    """Up to `count` captions, all different."""
    texts: dict[str, None] = {}
    for _ in range(TRIES * count):
        texts.setdefault(caption(scene, rng))
        if len(texts) == count:
            break
    return list(texts)


def samples(
    scenes: Sequence[Scene], start: int, captions: int, seed: int, size: int
) -> Iterator[tuple[str, bytes, str]]:
    """Yields (name, PNG, captions in lines) of scenes that are numbered from `start`."""
    for begin in range(0, len(scenes), TOGETHER):
        batch = scenes[begin : begin + TOGETHER]
        images = render(batch, size, chunk=16).permute(0, 2, 3, 1).contiguous().numpy()  # (n, H, W, 3) uint8
        for number, (scene, pixels) in enumerate(zip(batch, images, strict=True), start + begin):
            lines = captions_of(scene, captions, Random(f"{seed} {number}"))
            yield f"{number:07}", _png(pixels), "".join(f"{line}\n" for line in lines)


def _png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG, lightly compressed for speed."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _write_files(job: tuple[int, Sequence[Scene]], out: Path, **choices: int) -> int:
    start, scenes = job
    for name, picture, lines in samples(scenes, start, **choices):
        write_file(out / f"{name}.txt", lines.encode())  # first, so that no picture lacks its text
        write_file(out / f"{name}.png", picture)
    return len(scenes)


def _write_tar(job: tuple[int, Sequence[Scene]], out: Path, **choices: int) -> int:
    start, scenes = job
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, picture, lines in samples(scenes, start, **choices):
            for suffix, data in ((".png", picture), (".txt", lines.encode())):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    write_file(out / f"{start:07}.tar", stream.getvalue())
    return len(scenes)


def write_captioned(out: Path, captioned: Sequence[Captioned], size: int = PICTURE) -> int:
    """Writes scenes with their own captions (one a line) into the folder; returns their number."""
    check_folder(out)
    jobs = [(start, captioned[start : start + TOGETHER]) for start in range(0, len(captioned), TOGETHER)]
    return sum(_in_processes(partial(_write_captioned, out=out, size=size), jobs))


def _write_captioned(job: tuple[int, Sequence[Captioned]], out: Path, size: int) -> int:
    start, captioned = job
    images = render([item.scene for item in captioned], size, chunk=16)
    for number, (item, pixels) in enumerate(zip(captioned, images.permute(0, 2, 3, 1), strict=True), start):
        write_file(out / f"{number:07}.txt", "".join(f"{line}\n" for line in item.captions).encode())
        write_file(out / f"{number:07}.png", _png(pixels.contiguous().numpy()))
    return len(captioned)


def _in_processes(work: Callable[[T], int], jobs: Sequence[T]) -> Iterator[int]:
    """Runs work(job) for each job, in order, on all cores."""
    cores = min(os.cpu_count() or 1, max(len(jobs), 1))
    with ProcessPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, jobs)


def render_folder(
    out: Path,
    scenes: Sequence[Scene],
    seed: int = 0,
    captions: int = 4,
    tars: int | None = None,
    size: int = PICTURE,
) -> Iterator[int]:
    """Writes the scenes' pictures into the folder `out`; yields the number written so far.

    captions: largest number for each scene. tars: pictures in each tar; None writes single files.
    """
    if tars is not None and tars < 1:
        raise CascadeError(f"--tars is {tars}; at least one picture goes into a tar.")
    check_folder(out)
    per_job = tars or TOGETHER
    jobs = [(start, scenes[start : start + per_job]) for start in range(0, len(scenes), per_job)]
    work = partial(_write_tar if tars else _write_files, out=out, captions=captions, seed=seed, size=size)
    done = 0
    for count in _in_processes(work, jobs):
        done += count
        yield done


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cascade_nodes.demo.render_folder", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write into")
    parser.add_argument("--count", type=int, default=1000, help="pictures (1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    parser.add_argument(
        "--split", choices=("train", "held_out"), default="train", help="which scenes (train)"
    )
    parser.add_argument("--captions", type=int, default=4, help="captions of each picture, at most (4)")
    parser.add_argument(
        "--tars", type=int, metavar="N", help="write tars of N pictures instead of single files"
    )
    parser.add_argument("--size", type=int, default=PICTURE, help=f"pixels a side ({PICTURE})")
    options = parser.parse_args(arguments)
    scenes = sample_scenes(options.count, options.seed, options.split)
    written = render_folder(options.out, scenes, options.seed, options.captions, options.tars, options.size)
    for done in written:
        print(f"\r{done} of {options.count} pictures", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
