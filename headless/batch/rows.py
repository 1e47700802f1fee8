"""Rows of a batch: JSON lines, CSV or Parquet, and every combination of a grid's values."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from ...cascade_core.errors import CascadeError, excerpt, printable, quoted
from ...cascade_core.file_names import LONGEST_NAME, name_fault, path_fault
from ...cascade_core.reading import encoding_of, open_regular
from ..assignments import is_target
from ..seeds import SEED_INPUTS

NAME = "name"  # the column that names a row's pictures
_LONGEST_LABEL = 40  # characters of a value in a name
_MOST_ROWS = (
    1_000_000  # of a table, and of a grid, whose sizes multiply: each is checked before the first is made
)
_LARGEST_TABLE = 2**30  # bytes, unpacked


@dataclass(frozen=True)
class Row:
    """A row: the name of its pictures, and values by `NODE.INPUT`; or the sentence on why it is invalid."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Axis:
    """An axis of a grid: an input, and the values that it takes."""

    target: str
    values: list[str]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: the rows of a grid's combinations, the last axis fastest."""

    name: str
    axes: Sequence[Axis]
    rows: list[str]


def read_rows(path: Path) -> list[Row]:
    """Reads a table. A row without a name is named by its number; an unreadable row is a row with a fault."""
    name = printable(str(path))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CascadeError(
            f"{name} does not have the name of a table; give a .jsonl, a .csv or a .parquet file."
        )
    try:
        rows = [_row(number, cells) for number, cells in enumerate(_bounded(reader(path, name), name), 1)]
    except UnicodeDecodeError as error:
        raise CascadeError(
            f"{name} is not text in UTF-8; save it as such, which spreadsheets call CSV UTF-8."
        ) from error
    except OSError as error:
        raise CascadeError(f"Cannot read the table {name}: {error.strerror}.") from error
    if not rows:
        raise CascadeError(f"{name} has no rows, so there is nothing to make.")
    return _distinct(rows)


def _bounded(rows: Iterable[dict[str, Any] | str], name: str) -> Iterator[dict[str, Any] | str]:
    for number, row in enumerate(rows):
        if number == _MOST_ROWS:
            raise CascadeError(f"{name} holds more than {_MOST_ROWS:,} rows; cut it into several.")
        yield row


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    with open_regular(path) as file:
        encoding = encoding_of(file.read(3))
        size = os.fstat(file.fileno()).st_size
    if size > _LARGEST_TABLE:
        raise CascadeError(
            f"{printable(str(path))} has {size:,} bytes, but {_LARGEST_TABLE:,} are the most; cut it into several."
        )
    with path.open(encoding=encoding, newline="") as text:
        yield text


def _json_lines(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
    """Yields each line's object, or the fault of the line; skips empty lines."""
    with _opened(path) as lines:
        yield from _objects(name, lines)


def _objects(name: str, lines: Iterable[str]) -> Iterator[dict[str, Any] | str]:
    first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            raise CascadeError(
                f"{name} is a JSON list; write each row's object in a line of its own, without [ and ]."
            )
        first = False
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number} of {name} is not JSON ({excerpt(str(error), 100)}); give an object in one line."
            continue
        if isinstance(value, dict):
            yield value
        else:
            yield f"line {number} of {name} is {quoted(value)}, but an object of values by NODE.INPUT was expected."


def _csv(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
    """Yields each line's cells by column; skips lines without a value. Spreadsheets separate by commas, semicolons or
    tabs, and fill lines up with empty cells.
    """
    with _opened(path) as lines:
        yield from _cells(name, lines)


def _cells(name: str, lines: Iterator[str]) -> Iterator[dict[str, Any] | str]:
    blank, header = next(((i, line) for i, line in enumerate(lines) if line.strip(",;\t \r\n")), (0, ""))
    separator = max(",;\t", key=header.count)
    table = csv.reader(itertools.chain([header], lines), delimiter=separator, strict=True)
    read = blank
    try:
        columns = [column.strip() for column in next(table, [])]
        read += table.line_num
        while columns and not columns[-1]:
            columns.pop()
        _check_columns(columns, name)
        for cells in table:
            read = blank + table.line_num
            while len(cells) > len(columns) and not cells[-1].strip():
                cells.pop()
            if len(cells) > len(columns):
                yield f"line {read} of {name} has {len(cells)} cells for {len(columns)} columns."
            elif any(cell.strip() for cell in cells):
                yield {column: cell for column, cell in zip(columns, cells, strict=False) if cell != ""}
    except csv.Error as error:
        raise CascadeError(
            f"{name} cannot be read beyond line {read} ({error}); put a text with quotation marks or line breaks in "
            "quotation marks, and double those inside it."
        ) from error


def _parquet(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
    """Yields each row's values by column."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CascadeError(
            f"{name} needs pyarrow, which is not installed: pip install 'cascade-nodes[parquet]'."
        ) from error
    try:
        with open_regular(path) as source, ParquetFile(source) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
            if file.metadata.num_rows > _MOST_ROWS or unpacked > _LARGEST_TABLE:
                raise CascadeError(
                    f"{name} holds {file.metadata.num_rows:,} rows of {unpacked:,} bytes, but {_MOST_ROWS:,} of "
                    f"{_LARGEST_TABLE:,} are the most that are read; cut it into several."
                )
            _check_columns(file.schema_arrow.names, name)
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise CascadeError(f"{name} cannot be read as a table: {excerpt(str(error))}.") from error


def _check_columns(columns: Sequence[str], name: str) -> None:
    for column in columns:
        if column not in (NAME, *SEED_INPUTS) and not is_target(column):
            raise CascadeError(f"The column {quoted(column)} of {name} is not NODE.INPUT, {NAME} or seed.")
    if len(set(columns)) < len(columns):
        raise CascadeError(
            f"{name} has two columns of one name; its columns: {excerpt(', '.join(columns), 500)}."
        )


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def _row(number: int, cells: dict[str, Any] | str) -> Row:
    """A row of cells. For null, or an empty cell of a CSV file, the graph keeps its value."""
    default = f"{number:05}"
    if isinstance(cells, str):
        return Row(default, fault=cells)
    values = {target: value for target, value in cells.items() if target != NAME and value is not None}
    name = cells.get(NAME)
    name = default if name is None else str(name).replace("\\", "/").removesuffix(".png")
    fault = picture_fault(name)
    if fault is not None:
        return Row(default, fault=f"the name {quoted(name)} {fault}; give it another.")
    return Row(PurePosixPath(name).as_posix(), values)


def picture_fault(name: str) -> str | None:
    """Why pictures cannot be saved under a row's name, as the end of a sentence; or None."""
    folder, slash, last = name.rpartition("/")
    if "%" in name:
        return "holds %, which begins a pattern in names of pictures"
    return path_fault(folder + slash) or name_fault(last)


def _distinct(rows: list[Row]) -> list[Row]:
    """The rows; a repeated name is a fault. Many file systems ignore differences of case and of Unicode's forms."""
    seen: set[str] = set()
    distinct = []
    for number, row in enumerate(rows, 1):
        key = unicodedata.normalize("NFC", row.name).casefold()
        if key in seen and row.fault is None:
            row = Row(
                row.name, fault=f"row {number} has the name of an earlier one; give each a name of its own."
            )
        seen.add(key)
        distinct.append(row)
    return distinct


def read_axis(text: str) -> Axis:
    """`NODE.INPUT=a,b,"c, d"` as an axis of a grid."""
    target, equals, listed = text.partition("=")
    if not equals or (target not in SEED_INPUTS and not is_target(target)):
        raise CascadeError(f"--grid {quoted(text)} is not NODE.INPUT=a,b,c, such as 3.cfg=2,4,6.")
    try:
        (values,) = csv.reader([listed], skipinitialspace=True, strict=True)
    except (ValueError, csv.Error):
        raise CascadeError(
            f'--grid {quoted(text)} has no list of values after "="; write a,b,c, with quotes around one with commas.'
        ) from None
    if not values:
        raise CascadeError(f'--grid {quoted(text)} has no values; write a,b,c after "=".')
    if len(set(values)) < len(values):
        raise CascadeError(f"--grid {quoted(text)} names a value twice.")
    return Axis(target, values)


def grid_rows(rows: list[Row], axes: Sequence[Axis]) -> tuple[list[Row], list[Sheet]]:
    """Every row with every combination of the axes' values, and a contact sheet for each row."""
    count = len(rows)
    for axis in axes:
        count *= len(axis.values)
    if count > _MOST_ROWS:
        raise CascadeError(
            f"--grid makes {count:,} rows, but {_MOST_ROWS:,} is the most; give shorter lists."
        )
    if len({axis.target for axis in axes}) < len(axes):
        raise CascadeError("--grid names one input twice; give all its values in one list.")
    crossed, sheets = [], []
    for row in rows:
        if row.fault is not None:
            crossed.append(row)
            continue
        names = []
        for number, values in enumerate(itertools.product(*(axis.values for axis in axes)), 1):
            targets = [axis.target for axis in axes]
            labels = "_".join(_label(target, value) for target, value in zip(targets, values, strict=True))
            # With a number, since labels are cut, and values of different inputs may look the same.
            name = f"{row.name}_{number:03}_{labels}"
            if len(name.rpartition("/")[2].encode()) > LONGEST_NAME - 20:
                name = f"{row.name}_{number:03}"
            crossed.append(
                replace(row, name=name, values=row.values | dict(zip(targets, values, strict=True)))
            )
            names.append(name)
        sheets.append(Sheet(row.name, axes, names))
    return _distinct(crossed), sheets


def _label(target: str, value: str) -> str:
    """Label of an input and its value: `3.cfg` and `4.0` become cfg-4.0."""
    name = target.rpartition(".")[2]
    return f"{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', value).strip('-.')[:_LONGEST_LABEL]}".rstrip("-.")
