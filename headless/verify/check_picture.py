"""The report's picture, compared with diffusers' if that is installed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...cascade_core import writing
from ...cascade_core.checkpoints import locate
from ...cascade_core.model_files import PARTS
from ...cascade_core.pictures import to_pil
from .files import shown_name
from .in_diffusers import NOT_THE_SAME, SAME, picture_in_diffusers
from .networks import difference, number, statistics
from .picture import MadePicture, PictureRun, Skipped, check_memory, find_files, make_picture
from .report import Report

if TYPE_CHECKING:
    from ..progress import TransferProgress

LEAST_PSNR = 30.0  # dB, if both compute in float32; in 16 bits both are right but differ more


def check_picture(
    report: Report,
    run: PictureRun,
    prefer: str,
    dtype: str,
    device: str,
    memory: str | None,
    library: Any,
    progress: TransferProgress,
) -> None:
    """Makes the picture of a run and adds it to the report, or the reason why it was not made.

    library: diffusers, or None.  Raises CascadeError for failures.
    """
    entry: dict[str, Any] = {"settings": run.settings()}
    report.data["picture"] = entry
    try:
        files = find_files(report.roots, prefer, dtype)
        check_memory(files, dtype, device)
    except Skipped as reason:
        entry["skipped"] = report.names_only(str(reason))
        return
    entry["files"] = {role: shown_name(locate(path, PARTS[role])) for role, path in files.items()}
    made = make_picture(run, files, dtype, device, memory, progress)
    entry |= {
        "device": made.device,
        "dtype": made.dtype,
        "seconds": made.seconds,
        "peak_bytes": made.peak_bytes,
        "latent": statistics(made.latent),
        "pixels": statistics(made.pixels),
        "file": _save(report.picture_paths()[0], made.pixels),
    }
    if library is not None:
        progress.node_notified(f"made; now by diffusers {library.__version__}")
        with report.recording("The picture by diffusers"):
            entry["diffusers"] = _compare(report, run, files, made, library, progress)


def _compare(
    report: Report,
    run: PictureRun,
    files: Mapping[str, Path],
    made: MadePicture,
    library: Any,
    progress: TransferProgress,
) -> dict[str, Any]:
    begun = time.perf_counter()
    latent, pixels = picture_in_diffusers(library, run, files, made, progress)
    error = (made.pixels - pixels).square().mean().item()
    psnr = -10 * math.log10(max(error, 1e-12))
    if made.dtype == "float32" and not psnr >= LEAST_PSNR:
        report.add_problem(
            f"The picture and diffusers' differ (PSNR {number(psnr, 3)} dB), though both are in float32."
        )
    return {
        "latent": {**difference(made.latent, latent), **statistics(latent)},
        "pixels": {**difference(made.pixels, pixels), **statistics(pixels)},
        "psnr": number(psnr, 4),
        "seconds": round(time.perf_counter() - begun, 2),
        "file": _save(report.picture_paths()[1], pixels),
        "same": SAME,
        "not_the_same": NOT_THE_SAME,
    }


def _save(path: Path, pixels: Tensor) -> str:
    with writing.replacing(path, overwrite=False) as temporary:
        to_pil(pixels)[0].save(temporary, "PNG")
    return path.name
