"""A run's log: JSON lines, and a curve of the loss."""

import json
import math
from pathlib import Path
from typing import Any

from ..writing import replacing, write_file

Row = dict[str, Any]
LOG, CURVE = "log.jsonl", "loss.png"


class Log:
    """`log.jsonl` in the run's folder. Resuming drops the lines that a killed run wrote after its last checkpoint."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / LOG
        self.rows = [row for row in _read(self.path) if row["step"] <= step] if step else []
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[Row]:
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def duration(seconds: float) -> str:
    """3700 -> "1:01:40" """
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


TRAINED, SMOOTHED, VALIDATED, AXIS, LINE = "#a9c4e6", "#1f5fbf", "#d9731a", "#555555", "#dddddd"


def draw_curve(rows: list[Row], steps: int, path: Path, size: tuple[int, int] = (720, 400)) -> None:
    """Draws the loss over steps on a logarithmic scale, as logged and smoothed over a twentieth of the run.

    The error on held-out pictures is drawn with it, where rows have one.
    """
    from PIL import Image, ImageDraw

    points, validated = (
        [(row["step"], row[name]) for row in rows if row.get(name, 0) > 0] for name in ("loss", "validation")
    )
    if len(points) < 2:
        return
    width, height = size
    left, top, right, bottom = 64, 32, width - 16, height - 48
    values = [value for _, value in (*points, *validated)]
    low, high = round_out(min(values), up=False), round_out(max(values), up=True)

    def position(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / steps
        return x, bottom - (bottom - top) * (math.log(value) - math.log(low)) / (
            math.log(high) - math.log(low)
        )

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for value in _ticks(low, high):
        y = position(0, value)[1]
        draw.line([(left, y), (right, y)], fill=LINE)
        draw.text((left - 6, y), f"{value:.3g}", fill=AXIS, anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = position(steps * share, low)[0]
        draw.line([(x, top), (x, bottom)], fill=LINE)
        draw.text((x, bottom + 6), f"{round(steps * share)}", fill=AXIS, anchor="mt")
    draw.text(((left + right) / 2, height - 14), "step", fill=AXIS, anchor="mm")
    draw.text((left, 14), "loss (logarithmic)", fill=AXIS, anchor="lm")
    legend = [("as logged", TRAINED), ("smoothed", SMOOTHED), ("held-out pictures", VALIDATED)]
    for i, (text, colour) in enumerate(legend if validated else legend[:2]):
        draw.text((left + 200 + 110 * i, 14), text, fill=colour, anchor="lm")
    draw.line([position(*point) for point in points], fill=TRAINED, width=1)
    draw.line([position(*point) for point in _smoothed(points)], fill=SMOOTHED, width=2)
    if validated:
        draw.line([position(*point) for point in validated], fill=VALIDATED, width=2)
    for x, y in (position(*point) for point in validated):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=VALIDATED)
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def round_out(value: float, up: bool) -> float:
    """Rounds to one or two leading digits, away from the data, so that the curve has room."""
    step = 10.0 ** math.floor(math.log10(value)) / 2
    return (
        (math.floor(value / step) + 1) * step if up else max((math.ceil(value / step) - 1) * step, step / 2)
    )


def _ticks(low: float, high: float) -> list[float]:
    ticks = [low * (high / low) ** (i / 4) for i in range(5)]
    return [float(f"{tick:.3g}") for tick in ticks]


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    decay = 1 - 1 / max(len(points) / 20, 1)
    value, smoothed = points[0][1], []
    for step, loss in points:
        value = decay * value + (1 - decay) * loss
        smoothed.append((step, value))
    return smoothed
