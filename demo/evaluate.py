"""Measures the demo cascade on held-out scenes: `python -m cascade_nodes.demo.evaluate`.

Prompts are of scenes with a held-out (shape, colour) pair or (object, relation, object) triple; the judge reads the
pictures. Prints a table, and with --json FILE writes the figures.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from cascade_nodes.cascade_core.writing import output_file, replacing, write_file
from cascade_nodes.demo.captions import ObjectSpec, Spec, full_spec, verbalise
from cascade_nodes.demo.dataset import as_float, pictures, to_uint8
from cascade_nodes.demo.judge import read, score, summary
from cascade_nodes.demo.pipeline import DECODER, PRIOR, WEIGHTS, DemoCascade, Sampling
from cascade_nodes.demo.world import BACKGROUNDS, SHAPES, Scene, sample_scenes

SEED = 20_000
MEASUREMENTS = ("adherence", "unguided", "negative", "reconstruction", "judge")


def prompts_of(scenes: Sequence[Scene]) -> tuple[list[str], list[Spec]]:
    """Prompts that state everything, in random words, and their specs."""
    rng = Random(SEED)
    specs = [full_spec(scene) for scene in scenes]
    return [verbalise(spec, rng) for spec in specs], specs


def adherence(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling
) -> tuple[dict[str, float], Tensor]:
    """Adherence rates of `count` held-out prompts, and the pictures."""
    prompts, specs = prompts_of(sample_scenes(count, SEED, "held_out"))
    images = cascade.pictures(prompts, SEED, prior, decoder)
    scores = [score(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]
    return summary(scores), images


def reconstruction(cascade: DemoCascade, count: int, decoder: Sampling) -> float:
    """Mean PSNR in dB of held-out scenes through compressor, Stage B and Stage A."""
    images = pictures(sample_scenes(count, SEED + 1, "held_out"), cascade.device)
    psnr = []
    for start in range(0, count, 50):
        batch = images[start : start + 50]
        error = (
            (cascade.reconstruct(batch, SEED + start, decoder) - as_float(batch).cpu())
            .square()
            .mean(dim=(1, 2, 3))
        )
        psnr.append(-10 * error.log10())
    return torch.cat(psnr).mean().item()


def red_objects(cascade: DemoCascade, count: int, negative: str, prior: Sampling, decoder: Sampling) -> int:
    """Number of red objects in pictures of `count` prompts without a colour."""
    rng = Random(SEED)
    specs = [
        Spec((ObjectSpec(shape=rng.choice(SHAPES)),), background=rng.choice(BACKGROUNDS), exact=True)
        for _ in range(count)
    ]
    prompts = [verbalise(spec, rng) for spec in specs]
    readings = read(cascade.pictures(prompts, SEED, prior, decoder, negative))
    return sum(o.colour == "red" for reading in readings for o in reading.objects)


def judge_on_renders(count: int, device: torch.device) -> float:
    """Share of rendered held-out scenes that the judge reads fully right."""
    scenes = sample_scenes(count, SEED + 2, "held_out")
    readings = read(pictures(scenes, device).cpu())
    rates = summary(score(reading, full_spec(scene)) for reading, scene in zip(readings, scenes, strict=True))
    return rates["all_right"]


def contact_sheet(images: Tensor, columns: int = 8) -> Tensor:
    """uint8 (N, 3, H, W) -> (H · rows, W · columns, 3)"""
    columns = min(columns, len(images))
    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns))  # (rows, columns, 3, H, W)
    return grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def machine_name(device: str) -> str:
    """Name of the device that figures were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def write_sheet(images: Tensor, path: Path, count: int = 48, columns: int = 8) -> None:
    """Writes a contact sheet of the first pictures (N, 3, H, W) in [0, 1] as PNG or JPEG."""
    from PIL import Image

    sheet = Image.fromarray(contact_sheet(to_uint8(images[:count]), columns).numpy())
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG" if path.suffix.lower() == ".png" else "JPEG", quality=88)


def evaluate(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling, measurements: Sequence[str] = ()
) -> tuple[dict[str, float], Tensor | None]:
    """Figures of `measurements` (empty: all), and the pictures of the held-out prompts.

    Adherence takes `count` prompts, the comparisons half as many.
    """
    figures: dict[str, float] = {}
    images = None
    chosen = set(measurements or MEASUREMENTS)
    if "adherence" in chosen:
        figures, images = adherence(cascade, count, prior, decoder)
    if "unguided" in chosen:
        rates, _ = adherence(cascade, count // 2, replace(prior, cfg=1.0), decoder)
        figures |= {f"{name}_at_guidance_1": rates[name] for name in ("objects_shape", "all_right")}
    if "negative" in chosen:
        figures["red_objects"] = red_objects(cascade, count // 2, "", prior, decoder)
        figures["red_objects_with_negative_red"] = red_objects(cascade, count // 2, "red", prior, decoder)
    if "reconstruction" in chosen:
        figures["reconstruction_psnr_db"] = reconstruction(cascade, min(count, 200), decoder)
    if "judge" in chosen:
        figures["judge_on_renders"] = judge_on_renders(4 * count, cascade.device)
    return figures, images


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default: 500)")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=(), help="only these figures")
    parser.add_argument("--cfg", type=float, default=PRIOR.cfg)
    parser.add_argument("--cfg-rescale", type=float, default=PRIOR.cfg_rescale)
    parser.add_argument("--shift", type=float, default=PRIOR.shift)
    parser.add_argument("--decoder-cfg", type=float, default=DECODER.cfg)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument(
        "--sheet", type=output_file, help="write a contact sheet of the pictures here (.jpg, .png)"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    cascade = DemoCascade.load(options.weights, options.device)
    prior = replace(PRIOR, cfg=options.cfg, cfg_rescale=options.cfg_rescale, shift=options.shift)
    figures, images = evaluate(
        cascade, options.count, prior, replace(DECODER, cfg=options.decoder_cfg), options.only
    )
    machine = machine_name(options.device)
    context = {"count": options.count, "machine": machine, "date": date.today().isoformat()}
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    print(f"{options.count} prompts on {machine}, {time.monotonic() - started:.0f} s")
    if options.json:
        write_file(options.json, json.dumps(context | figures, indent=2) + "\n")
    if options.sheet and images is not None:
        write_sheet(images, options.sheet)


if __name__ == "__main__":
    main()
