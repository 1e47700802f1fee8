"""Measures the demo cascade on held-out scenes: `python -m cascade_nodes.demo.evaluate`.

Prompts are of scenes with a held-out (shape, colour) pair or (object, relation, object) triple; the judge reads the
pictures. Prints a table. --json FILE writes the figures, those of objects also by pair, size and colour; a share is
[share, low, high, count] with Wilson's interval. Each of these has a set of its own, by --only: pairs (each pair of
shape and colour), renderer (Stage B alone, from the renderer's latents), three (objects), negation, punctuation,
proportions, judges (the second beside the first), embeddings (what a small network reads from the image encoder's).
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
from cascade_nodes.demo.measuring import SEED, prompts_of
from cascade_nodes.demo.pipeline import DECODER, PRIOR, WEIGHTS, DemoCascade, Sampling
from cascade_nodes.demo.shares import Groups, Share, by_kind, lowest
from cascade_nodes.demo.wide_tasks import WIDE_TASKS, Figures
from cascade_nodes.demo.world import BACKGROUNDS, SHAPES, sample_scenes

MEASUREMENTS = ("adherence", "unguided", "negative", "reconstruction", "judge", *WIDE_TASKS)


def adherence(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling
) -> tuple[dict[str, float], Tensor, Groups]:
    """Adherence rates of `count` held-out prompts, the pictures, and shares of right objects by kind."""
    prompts, specs = prompts_of(sample_scenes(count, SEED, "held_out"))
    images = cascade.pictures(prompts, SEED, prior, decoder)
    scores = [score(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]
    return summary(scores), images, by_kind(scores, specs)


def reconstruction(cascade: DemoCascade, count: int, decoder: Sampling) -> float:
    """Mean PSNR in dB of held-out scenes through compressor, Stage B and Stage A."""
    images = pictures(sample_scenes(count, SEED + 1, "held_out"), cascade.device)
    psnr = []
    for start in range(0, count, cascade.batch):
        batch = images[start : start + cascade.batch]
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
    readings = read(pictures(scenes, device))
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
) -> tuple[Figures, dict[str, Tensor]]:
    """Figures of `measurements` (empty: all), and the pictures of those that make some.

    Adherence takes `count` prompts, the comparisons half as many.
    """
    figures: Figures = {}
    images: dict[str, Tensor] = {}
    chosen = set(measurements or MEASUREMENTS)
    if "adherence" in chosen:
        rates, images["adherence"], groups = adherence(cascade, count, prior, decoder)
        figures |= {**rates, "by": groups}
    if "unguided" in chosen:
        rates, *_ = adherence(cascade, count // 2, replace(prior, cfg=1.0), decoder)
        figures |= {f"{name}_at_guidance_1": rates[name] for name in ("objects_shape", "all_right")}
    if "negative" in chosen:
        figures["red_objects"] = red_objects(cascade, count // 2, "", prior, decoder)
        figures["red_objects_with_negative_red"] = red_objects(cascade, count // 2, "red", prior, decoder)
    if "reconstruction" in chosen:
        figures["reconstruction_psnr_db"] = reconstruction(cascade, min(count, 200), decoder)
    if "judge" in chosen:
        figures["judge_on_renders"] = judge_on_renders(4 * count, cascade.device)
    for name in WIDE_TASKS:
        if name in chosen:
            found, images[name] = WIDE_TASKS[name](cascade, count, prior, decoder)
            figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures, images


def lines(figures: Figures) -> list[str]:
    """The figures as text: shares with their intervals, and for groups the smallest shares."""
    text = []
    for name, value in figures.items():
        if isinstance(value, dict):
            text += [f"{name} {kind}: lowest {lowest(groups)}" for kind, groups in value.items()]
        elif isinstance(value, Share):
            text.append(f"{name:32} {value.share:.4f} ({value.low:.3f} to {value.high:.3f} of {value.count})")
        else:
            text.append(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    return text


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
    parser.add_argument("--sheets", type=Path, help="write a contact sheet of each set into this folder")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    cascade = DemoCascade.load(options.weights, options.device)
    prior = replace(PRIOR, cfg=options.cfg, cfg_rescale=options.cfg_rescale, shift=options.shift)
    figures, images = evaluate(
        cascade, options.count, prior, replace(DECODER, cfg=options.decoder_cfg), options.only
    )
    machine = machine_name(options.device)
    context = {"count": options.count, "machine": machine, "date": date.today().isoformat()}
    print("\n".join(lines(figures)))
    print(f"{options.count} prompts on {machine}, {time.monotonic() - started:.0f} s")
    if options.json:
        write_file(options.json, json.dumps(context | figures, indent=2) + "\n")
    for name, shown in images.items():
        if options.sheet and name == "adherence":
            write_sheet(shown, options.sheet)
        if options.sheets:
            write_sheet(shown, options.sheets / f"{name}.jpg")


if __name__ == "__main__":
    main()
