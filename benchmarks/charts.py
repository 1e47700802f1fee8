"""Bars and curves as PNG or SVG, with only Pillow. A PNG is drawn at twice the size and shrunk, for smooth lines."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cascade_nodes.cascade_core.writing import replacing, write_file

FINE = 2
INK, FAINT, GRID = "#333333", "#777777", "#dddddd"
COLOURS = ("#1f5fbf", "#c0561f", "#2e8b57", "#8a4fbf")
MUTED = "#a9b7c9"
ANCHORS = {"l": "start", "m": "middle", "r": "end"}
BASELINES = {"t": 0.8, "m": 0.35}  # of a font's size below a point
Points = Sequence[tuple[float, float]]


class Chart:
    """White image of (width, height) pixels with a title."""

    def __init__(self, title: str, size: tuple[int, int]):
        self.width, self.height = size
        self.image = Image.new("RGB", (FINE * self.width, FINE * self.height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.text((16, 12), title, 15, INK, "lt")

    def text(
        self, at: tuple[float, float], words: str, points: int = 12, ink: str = FAINT, anchor: str = "lm"
    ) -> float:
        """Draws text and returns the x coordinate where it begins."""
        font = ImageFont.load_default(FINE * points)
        place = (FINE * at[0], FINE * at[1])
        self.pen.text(place, words, fill=ink, font=font, anchor=anchor)
        return self.pen.textbbox(place, words, font=font, anchor=anchor)[0] / FINE

    def line(self, points: Points, ink: str, width: float = 1):
        self.pen.line([(FINE * x, FINE * y) for x, y in points], fill=ink, width=round(FINE * width))

    def box(self, corners: tuple[float, float, float, float], ink: str):
        self.pen.rectangle([FINE * value for value in corners], fill=ink)

    def save(self, path: Path) -> None:
        """Writes the PNG atomically."""
        with replacing(path) as temporary:
            self.image.reduce(FINE).save(temporary, "PNG")  # averages, without halos


class SvgChart(Chart):
    """A chart as SVG, with text widths measured in Pillow's font."""

    def __init__(self, title: str, size: tuple[int, int]):
        self.parts: list[str] = []
        self.width, self.height = size
        self.box((0, 0, *size), "white")
        self.text((16, 12), title, 15, INK, "lt")

    def text(
        self, at: tuple[float, float], words: str, points: int = 12, ink: str = FAINT, anchor: str = "lm"
    ) -> float:
        across, down = anchor
        x, y = at[0], at[1] + points * BASELINES[down]
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{ink}" font-size="{points}" text-anchor="{ANCHORS[across]}">'
            f"{escape(words)}</text>"
        )
        width = ImageFont.load_default(points).getlength(words)
        return x - width * {"l": 0, "m": 0.5, "r": 1}[across]

    def line(self, points: Points, ink: str, width: float = 1):
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{places}" fill="none" stroke="{ink}" stroke-width="{width:g}"/>'
        )

    def box(self, corners: tuple[float, float, float, float], ink: str):
        left, top, right, bottom = corners
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        self.parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{ink}"/>')

    def save(self, path: Path) -> None:
        """Writes the SVG atomically."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        write_file(path, "\n".join([head, *self.parts, "</svg>"]) + "\n")


def _new_chart(title: str, size: tuple[int, int], path: Path) -> Chart:
    return (SvgChart if path.suffix == ".svg" else Chart)(title, size)


def bars(
    title: str,
    values: Mapping[str, float],
    unit: str,
    path: Path,
    highlighted: Sequence[str],
    limit: float | None = None,
    left: int = 190,
):
    """Draws one bar for each name, highlighted ones in colour, and a line at the limit that none can pass.

    left: pixels for the names.
    """
    right, top, step = 70, 52, 34
    chart = _new_chart(title, (760, top + step * len(values) + (12 if limit is None else 34)), path)
    largest = max(*values.values(), limit or 0)

    def place(value: float) -> float:
        return left + (chart.width - left - right) * value / largest

    for i, (name, value) in enumerate(values.items()):
        y = top + step * i
        chart.text((left - 10, y + step / 2), name, 13, INK, "rm")
        chart.box(
            (left, y + 6, max(place(value), left + 1), y + step - 6),
            COLOURS[0] if name in highlighted else MUTED,
        )
        chart.text((place(value) + 8, y + step / 2), f"{value:.3g} {unit}", 13, INK)
    if limit is None:
        chart.save(path)
        return
    bottom = top + step * len(values)
    chart.line([(place(limit), top), (place(limit), bottom + 4)], COLOURS[1], 1.5)
    chart.text((place(limit), bottom + 8), f"limit of the card {limit:.2g} {unit}", 12, COLOURS[1], "lt")
    chart.save(path)


def curves(
    title: str,
    panels: Mapping[str, Mapping[str, Points]],
    x_label: str,
    path: Path,
    named: Mapping[float, str] | None = None,
):
    """Panels side by side, by the label of their y axis; both axes are logarithmic. `named`: names of some x values."""
    chart = _new_chart(title, (760, 380), path)
    share = chart.width / len(panels)
    for i, (y_label, series) in enumerate(panels.items()):
        area = (share * i + 58, 70, share * (i + 1) - 20, chart.height - 54)
        _panel(chart, area, y_label, x_label, series, named or {})
    chart.save(path)


def _panel(
    chart: Chart,
    area: tuple[float, float, float, float],
    y_label: str,
    x_label: str,
    series: Mapping[str, Points],
    named: Mapping[float, str],
) -> None:
    left, top, right, bottom = area
    all_points = [point for points in series.values() for point in points]
    xs, ys = sorted({x for x, _ in all_points}), [y for _, y in all_points if y > 0]
    low, high = _whole_powers(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        width = math.log(xs[-1] / xs[0]) or 1
        across = math.log(x / xs[0]) / width
        return left + (right - left) * across, bottom - (bottom - top) * math.log(y / low) / math.log(
            high / low
        )

    chart.text((left - 46, top - 20), y_label, 12, INK, "lm")
    for tick in _ticks(low, high):
        y = place(xs[0], tick)[1]
        chart.line([(left, y), (right, y)], GRID)
        chart.text((left - 6, y), f"{tick:g}", 11, FAINT, "rm")
    for x in xs:
        at = place(x, low)[0]
        chart.line([(at, top), (at, bottom)], GRID)
        chart.text((at, bottom + 6), named.get(x, f"{x:g}"), 11, FAINT, "mt")
    chart.text(((left + right) / 2, bottom + 26), x_label, 12, INK, "mt")
    legend = right
    inked = list(zip(COLOURS, series.items(), strict=False))
    for ink, (name, _) in inked:
        legend = chart.text((legend, top - 20), name, 12, ink, "rm") - 14
    for ink, (_, points) in reversed(inked):  # the first lies on top
        places = [place(x, y) for x, y in points if y > 0]
        if len(places) > 1:
            chart.line(places, ink, 2)
        for x, y in places:
            chart.box((x - 2.5, y - 2.5, x + 2.5, y + 2.5), ink)


def _whole_powers(values: Sequence[float]) -> tuple[float, float]:
    """Powers of two around the values."""
    low, high = 2.0 ** math.floor(math.log2(min(values))), 2.0 ** math.ceil(math.log2(max(values)))
    return low, high if high > low else 2 * low


def _ticks(low: float, high: float) -> list[float]:
    """About eight powers of two between the limits, at most."""
    count = round(math.log2(high / low))
    step = max(1, math.ceil(count / 8))
    return [low * 2.0**i for i in range(0, count + 1, step)]
