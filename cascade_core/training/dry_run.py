"""Dry run, without loading networks: a run's buckets, and a page of pictures as they would be cropped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from ..errors import counted, printable
from .data.access import Access
from .data.batches import crops_of
from .data.bucketing import BucketedPicture, Crops, assign_buckets, resized
from .data.cache import Cache
from .data.captions import trained_captions
from .data.pictures import PictureError
from .data.sources import find_all, reasons
from .run_folder import Notify
from .samples import grid, write_picture
from .settings import Settings

DIMMED = 0.25  # brightness of masked-out areas on the sheet
SHEET, SHOWN, SIDE = "contact_sheet.png", 64, 192  # pictures on it, and pixels of the longer side of each


def dry_run(settings: Settings, notify: Notify) -> Path:
    """Reports the buckets and the treatment of pictures, and draws some of them. Returns the page's file."""
    access = Access()
    pictures, skipped = find_all(settings.data, access)
    bucketed, left_out = assign_buckets(pictures, settings.data, Cache(None, ""), access.ask)
    skipped += left_out
    by_bucket: dict[str, list[BucketedPicture]] = {}
    for each in sorted(bucketed, key=lambda each: each.bucket):
        by_bucket.setdefault(str(each.bucket), []).append(each)
    for bucket, members in by_bucket.items():
        first = members[0].picture
        caption = trained_captions(first.captions, settings.data, first.set)[0]
        notify(f"{bucket}: {len(members):,}, such as {printable(first.name)}: {printable(caption)}")
    for sentence in (resized(bucketed).sentence(), skipped and f"left out: {reasons(skipped)}"):
        if sentence:
            notify(f"{sentence}.")
    path = Path(settings.output.folder or ".") / SHEET
    write_picture(path, grid([_small(each, crops_of(settings.data)) for each in _spread(bucketed)]))
    notify(
        f"{len(bucketed):,} of {counted(len(bucketed) + len(skipped), 'picture')} would be trained on; {path} "
        "shows some."
    )
    return path


def _spread(pictures: list[BucketedPicture]) -> list[BucketedPicture]:
    """Pictures for one page, evenly from all buckets."""
    ordered = sorted(pictures, key=lambda each: (each.bucket, each.picture.name))
    count = min(len(ordered), SHOWN)
    return [ordered[i * len(ordered) // count] for i in range(count)]


def _small(picture: BucketedPicture, crops: Crops) -> torch.Tensor:
    """(3, H, W) in [0, 1]: the compressor's input made smaller, dark outside its mask; grey for a damaged picture."""
    crop = crops.of(picture, 0)
    height, width = picture.bucket.compressor
    scale = SIDE / max(height, width)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    try:
        pixels = picture.pixels((height, width), crop).float() / 255
        if picture.picture.mask is not None:
            mask = F.interpolate(picture.mask(crop)[None, None].float() / 255, (height, width))[0]
            pixels = pixels * (DIMMED + (1 - DIMMED) * mask)
    except PictureError:
        return torch.full((3, *size), 0.5)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
