"""Measures pictures larger than the demo was trained at: `python -m cascade_nodes.demo.high_resolution`.

A first pass composes at 256×256, a second one makes the picture at a multiple of that. The judge reads both, the larger
one resized. Prompts are those of `evaluate`. --sizes measures text to image at other sizes in one pass instead, without
the words for sizes and places, which mean parts of a square.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.writing import output_file, write_file
from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.dataset import as_float, pictures
from cascade_nodes.demo.evaluate import SEED, prompts_of, write_sheet
from cascade_nodes.demo.judge import read, score, summary
from cascade_nodes.demo.pipeline import DECODER, SECOND_PASS, WEIGHTS, DemoCascade, Size
from cascade_nodes.demo.recipe import PICTURE
from cascade_nodes.demo.world import sample_scenes

BATCH = 8
WAYS = ("enlarged", "unfolded")


def two_passes(
    cascade: DemoCascade,
    prompts: Sequence[str],
    scale: int,
    way: str,
    tile_pixels: int = 0,
    denoise: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures of the first and of the second pass, on the CPU.

    way: enlarged, from the first pass's picture, one doubling after the other; or unfolded, from its Stage C latent
    alone, which Stage B decodes at the larger size. tile_pixels: side of Stage B's tiles, 0: none.
    """
    second_pass = SECOND_PASS if denoise is None else replace(SECOND_PASS, denoise=denoise)
    first, second = [], []
    for start in range(0, len(prompts), BATCH):
        batch, seed = prompts[start : start + BATCH], SEED + start
        latents = cascade.prior(batch, seed)
        images = cascade.decode(latents, batch, seed).cpu()
        first.append(images)
        if way == "unfolded":
            images = cascade.decode(
                latents, batch, seed, DECODER, (scale * PICTURE, scale * PICTURE), tile_pixels=tile_pixels
            ).cpu()
        while images.shape[-1] < scale * PICTURE:
            images = cascade.enlarge(images, batch, seed, how=second_pass, tile_pixels=tile_pixels)
        second.append(images)
    return torch.cat(first), torch.cat(second)


def rates(images: Tensor, specs: Sequence[Spec]) -> dict[str, float]:
    """Rates by the judge; with_more and with_fewer: pictures with more or fewer objects than the prompt states."""
    readings = read(images)
    differences = [len(r.objects) - len(s.objects) for r, s in zip(readings, specs, strict=True)]
    return {
        **summary(score(reading, spec) for reading, spec in zip(readings, specs, strict=True)),
        "with_more": sum(difference > 0 for difference in differences) / len(specs),
        "with_fewer": sum(difference < 0 for difference in differences) / len(specs),
    }


def detail(images: Tensor) -> float:
    """Root mean square difference between pictures in [0, 1] and the same pictures halved and doubled in size."""
    halved = F.avg_pool2d(images, 2)
    doubled = F.interpolate(halved, scale_factor=2, mode="bilinear", align_corners=False)
    return (images - doubled).square().mean().sqrt().item()


def high_resolution(
    cascade: DemoCascade, count: int, scale: int, way: str, tile_pixels: int = 0, denoise: float | None = None
) -> tuple[dict[str, float], Tensor]:
    """Figures of both passes over `count` held-out prompts, and the pictures of the second.

    kept: adherence (right in everything) of the second pass as a share of the first's; detail: finest detail of the
    second, as a share of that of rendered scenes of that size.
    """
    scenes = sample_scenes(count, SEED, "held_out")
    prompts, specs = prompts_of(scenes)
    first, second = two_passes(cascade, prompts, scale, way, tile_pixels, denoise)
    before, after = rates(first, specs), rates(second, specs)
    rendered = as_float(pictures(scenes, torch.device("cpu"), scale * PICTURE))
    figures = {f"{name}_at_1x": value for name, value in before.items()}
    figures |= {f"{name}_at_{scale}x": value for name, value in after.items()}
    figures["kept"] = after["all_right"] / before["all_right"] if before["all_right"] else float("nan")
    figures["detail"] = detail(second) / detail(rendered)
    return figures, second


def at_size(cascade: DemoCascade, count: int, size: Size) -> tuple[dict[str, float], Tensor]:
    """Figures of text to image in one pass at a size (height, width), and the pictures."""
    prompts, specs = prompts_of(sample_scenes(count, SEED, "held_out"))
    images = cascade.pictures(prompts, SEED, batch=BATCH, size=size)
    specs = [placeless(spec) for spec in specs]
    return rates(squared(images), specs), images


def placeless(spec: Spec) -> Spec:
    """Removes sizes and places from a spec."""
    return replace(spec, objects=tuple(replace(o, size=None, place=None) for o in spec.objects))


def squared(images: Tensor) -> Tensor:
    """Pads (N, 3, H, W) to squares by replicating the edges, so that shapes keep their proportions."""
    height, width = images.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top), mode="replicate")


def _size(text: str) -> Size:
    width, height = (int(side) for side in text.lower().split("x"))
    return height, width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=100, help="held-out prompts (default: 100)")
    parser.add_argument(
        "--scale",
        type=int,
        default=2,
        choices=(2, 4),
        help="size of the second pass, times 256 pixels (default: 2)",
    )
    parser.add_argument(
        "--way", choices=WAYS, default=WAYS[0], help="start of the second pass (default: enlarged)"
    )
    parser.add_argument(
        "--denoise", type=float, default=SECOND_PASS.denoise, help="denoise of the enlarging pass"
    )
    parser.add_argument("--tile", type=int, default=0, help="pixels a side of Stage B's tiles; 0: whole")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="WxH", help="measure text to image at these sizes instead"
    )
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument(
        "--sheet", type=output_file, help="write a contact sheet of the pictures here (.jpg, .png)"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    cascade = DemoCascade.load(options.weights, options.device)
    figures: dict[str, float] = {}
    if options.sizes:
        for size in options.sizes:
            size_figures, images = at_size(cascade, options.count, size)
            figures |= {f"{name}_at_{size[1]}x{size[0]}": value for name, value in size_figures.items()}
    else:
        figures, images = high_resolution(
            cascade, options.count, options.scale, options.way, options.tile, options.denoise
        )
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}")
    print(f"{options.count} prompts on {options.device}, {time.monotonic() - started:.0f} s")
    if options.json:
        write_file(options.json, json.dumps({"count": options.count} | figures, indent=2) + "\n")
    if options.sheet:
        write_sheet(images, options.sheet, 16, columns=4)


if __name__ == "__main__":
    main()
