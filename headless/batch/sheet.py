"""Contact sheets: the pictures of a grid side by side, each row and column labelled with its values."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...cascade_core.errors import printable
from ...cascade_core.pictures import PictureError, open_picture, upright
from ...cascade_core.writing import write_file
from .journal import Journal
from .progress import BatchProgress
from .rows import Axis, Sheet

_LARGEST_CELL, _LARGEST_SIDE = 512, 8192  # pixels of a picture, and of a sheet
_SMALLEST_CELL = 64  # so that labels can be read
_GAP = 8
_PAPER, _INK, _EMPTY = "white", "black", "#dddddd"
_LONGEST_LABEL = 60  # characters
SUFFIX = "_sheet.png"


def sheets_that_fit(sheets: Sequence[Sheet], progress: BatchProgress) -> Sequence[Sheet]:
    """The sheets, which all have the same axes; none where they would be too large, which is said before the work."""
    if sheets and _room(sheets[0]) < _SMALLEST_CELL:
        progress.notify("The grid has more pictures than a contact sheet shows, so none is drawn.")
        return []
    return sheets


def draw_sheets(sheets: Iterable[Sheet], journal: Journal, progress: BatchProgress) -> None:
    """Writes the sheets that have a picture, with other processes' pictures too, so the last process's are complete."""
    journal.read()
    for sheet in sheets:
        cells = [next(iter(journal.pictures(name)), None) for name in sheet.rows]
        if not any(cells):
            continue
        name = f"{sheet.name}{SUFFIX}"
        path = journal.folder / name
        if name in journal.owners:
            progress.notify(f"{printable(str(path))} is a row's picture, so no contact sheet is drawn there.")
            continue
        stream = io.BytesIO()
        draw_sheet(sheet, cells).save(stream, format="PNG")
        write_file(path, stream.getvalue())
        progress.file_written(path)


def _columns_and_lines(sheet: Sheet) -> tuple[int, int]:
    columns = len(sheet.axes[-1].values)
    return columns, len(sheet.rows) // columns


def _room(sheet: Sheet) -> int:
    """The largest side of a cell, in pixels."""
    return _LARGEST_SIDE // (max(_columns_and_lines(sheet)) + 1) - _GAP


def draw_sheet(sheet: Sheet, cells: list[Path | None]) -> Image.Image:
    """One sheet: the last axis from left to right, the others from top to bottom."""
    *above, across = sheet.axes
    columns, lines = _columns_and_lines(sheet)
    sides = [max(_size(cell)) for cell in cells if cell is not None]
    cell = min(max(*sides, _SMALLEST_CELL), _LARGEST_CELL, _room(sheet))
    size = max(10, cell // 20)
    font = ImageFont.load_default(size)
    titles = [" · ".join(labels) for labels in itertools.product(*map(_labels, above))]
    heads = [_wrapped(label, font, cell) for label in _labels(across)]
    titles = [_wrapped(title, font, cell) for title in titles]
    line = int(size * 1.25)
    top = line * max(text.count("\n") + 1 for text in heads) + 2 * _GAP
    left = cell + 2 * _GAP if above else _GAP
    paper = Image.new("RGB", (left + columns * (cell + _GAP), top + lines * (cell + _GAP)), _PAPER)
    draw = ImageDraw.Draw(paper)
    for column, head in enumerate(heads):
        draw.multiline_text((left + column * (cell + _GAP), _GAP), head, _INK, font)
    for number, title in enumerate(titles if above else []):
        draw.multiline_text((_GAP, top + number * (cell + _GAP)), title, _INK, font)
    for number, path in enumerate(cells):
        x, y = left + number % columns * (cell + _GAP), top + number // columns * (cell + _GAP)
        thumbnail = _thumbnail(path, cell)
        if thumbnail is None:
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), _EMPTY)
        else:
            paper.paste(thumbnail, (x, y))
    return paper


def _labels(axis: Axis) -> list[str]:
    name = axis.target.rpartition(".")[2]
    return [f"{name} {printable(value, _LONGEST_LABEL)}" for value in axis.values]


def _size(path: Path) -> tuple[int, int]:
    try:
        with open_picture(path) as picture:
            return picture.size
    except PictureError:
        return (_SMALLEST_CELL, _SMALLEST_CELL)


def _thumbnail(path: Path | None, side: int) -> Image.Image | None:
    if path is None:
        return None
    try:
        with open_picture(path) as picture:
            small = upright(picture).convert("RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            return small
    except PictureError:  # changed since it was written
        return None


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text wrapped to `width` pixels where possible; words are not broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
