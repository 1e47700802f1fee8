"""Writes figures and tables of the pages from the results of benchmarks/served.py.

    python benchmarks/served_pages.py [FILE ...]

Draws docs/images/served.svg and served_by_memory.svg, and writes what stands between `<!-- served … -->` and
`<!-- end -->` in README.md, docs/performance.md and their Japanese pages, from
benchmarks/measurements/served.json. The rows of FILEs are put there first, without profiles; where several files have
a row, the last one counts.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import served_targets
from cascade_nodes.cascade_core.writing import write_file
from charts import bars, curves
from copies import BUSES
from served_graphs import PACK

MEASURED = Path(__file__).parent / "measurements" / "served.json"
IMAGES = PACK / "docs" / "images"
BLOCK = re.compile(r"(<!-- served (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ORDER = ("ours", "mixed", "native", "headless")
ALL = 24.0  # GB at which a plot shows the whole card

Row = dict[str, Any]

ENGLISH = {
    "ours": "this pack's nodes",
    "mixed": "ComfyUI's samplers and decoder on this pack's MODELs and VAE",
    "native": "ComfyUI's own nodes",
    "headless": "without ComfyUI",
    "nodes": "nodes",
    "memory": "memory",
    "all": "all",
    "seed": "a new seed",
    "prompt": "a new prompt",
    "png": "PNG preview",
    "first": "first picture",
    "cold": "with nothing compiled",
    "copied": "copied to the card",
    "at": "at {} GB/s",
    "predicted": "The columns with GB/s are predicted, for a card on a slower bus.",
    "s": "{} s",
    "pitch": "**In ComfyUI {version} without flags** a picture of 1024×1024 takes {ours} on an {device}.\n"
    "ComfyUI's own nodes take {native}.{less}\n"
    "These times were [measured](docs/performance.md) with random weights of the published sizes.",
    "pitch 8 GB": " With only 8 GB of the card's memory, our nodes take {}.",
    "figure": "Seconds of a picture in ComfyUI as it comes",
    "by memory": "Seconds of a picture by the card's memory",
    "place": "{device}, torch {torch}, {date}; ComfyUI {versions} without flags ({allocator})",
    "date": "%-d %B %Y",
}
JAPANESE = {
    "ours": "このパックのノード",
    "mixed": "このパックの MODEL と VAE で ComfyUI のサンプラーとデコーダー",
    "native": "ComfyUI 自身のノード",
    "headless": "ComfyUI なし",
    "nodes": "ノード",
    "memory": "メモリ",
    "all": "すべて",
    "seed": "新しいシード",
    "prompt": "新しいプロンプト",
    "png": "PNG プレビュー",
    "first": "最初の一枚",
    "cold": "未コンパイルの場合",
    "copied": "カードへのコピー",
    "at": "{} GB/s の場合",
    "predicted": "GB/s の列は、もっと遅いバスのカードについての予測値です。",
    "s": "{} 秒",
    "pitch": "**既定の設定の ComfyUI {version}** で、1024×1024 の画像一枚は {device} で {ours}です{less}。"
    "ComfyUI 自身のノードでは {native}です（[測定](docs/ja/performance.md)、公開されている大きさの乱数の重み）。",
    "pitch 8 GB": "（カードのメモリを 8 GB に限ると {}）",
    "figure": "既定の ComfyUI での画像一枚の秒数",
    "by memory": "カードのメモリと画像一枚の秒数",
    "place": "{device}、torch {torch}、{date}、ComfyUI {versions}、フラグなし（{allocator}）",
    "date": "%Y 年 %-m 月 %-d 日",
}


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of the files; a row in a later file replaces the same row of an earlier one."""
    rows: dict[Any, Row] = {}
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rows[row["who"], row["comfyui"], row["memory"], tuple(row["flags"])] = row
    return list(rows.values())


class Measured:
    """Rows that did not fail, newest version first, and tables of them."""

    def __init__(self, rows: list[Row]):
        self.all = rows
        self.rows = [row for row in rows if "error" not in row]
        found = {row["comfyui"] for row in self.rows if row["comfyui"]}
        self.versions = sorted(found, key=served_targets.numbers, reverse=True)

    def find(
        self, who: str, version: str | None, memory: float | None = None, flags: Sequence[str] = ()
    ) -> Row:
        """The row, or an empty one."""
        place = who, None if who == "headless" else version, memory, list(flags)
        return next((row for row in self.rows if (*(row[name] for name in KEY),) == place), {})

    def limits(self) -> list[float]:
        return sorted(
            {row["memory"] for row in self.rows if row["memory"] and not row["flags"]}, reverse=True
        )


KEY = ("who", "comfyui", "memory", "flags")


def pitch(measured: Measured, words: dict[str, str]) -> str:
    """One sentence about the newest version."""
    version = measured.versions[0]
    ours, native = measured.find("ours", version), measured.find("native", version)
    eight = measured.find("ours", version, 8.0)
    told = {
        "version": version,
        "device": card(ours),
        "ours": seconds(ours["seed"], words),
        "native": seconds(native["seed"], words),
    }
    less = words["pitch 8 GB"].format(seconds(eight["seed"], words)) if "seed" in eight else ""
    return words["pitch"].format(**told, less=less) + "\n"


def compiles(row: dict[str, Any]) -> bool:
    """Whether kernels were compiled for the row's first picture."""
    return row.get("compiled") is False and row["who"] not in ("native", "cold")


def whole(measured: Measured, words: dict[str, str]) -> str:
    """The machine, the figure, and the table for the whole card's memory."""
    several = len(measured.versions) > 1
    rows = []
    for who in ORDER:
        for version in measured.versions if who != "headless" else [None]:
            row = measured.find(who, version)
            if row:
                name = f"{words[who]}, {version}" if several and version else words[who]
                cold = measured.find("cold", version) if who == "ours" else {}
                if compiles(row):
                    cold = cold or row
                times = [row.get(quantity) for quantity in ("seed", "prompt", "png")]
                times += [None if compiles(row) else row.get("first"), cold.get("first")]
                rows.append([name, *(seconds(each, words) for each in times), gigabytes(row)])
    head = [words[name] for name in ("nodes", "seed", "prompt", "png", "first", "cold", "copied")]
    figure = f"![{words['figure']}](docs/images/served.svg)"
    return f"{figure}\n\n{place(measured, words)}\n\n{table(head, rows)}"


def by_memory(measured: Measured, words: dict[str, str]) -> str:
    """The figure and the table by memory, for the newest version; empty if no limit was measured."""
    limits, version = measured.limits(), measured.versions[0]
    if not limits:
        return ""
    rows = []
    for memory in [None, *limits]:
        ours, native = (measured.find(who, version, memory) for who in ("ours", "native"))
        predicted = ours.get("predicted", {})
        rows.append(
            [
                words["all"] if memory is None else f"{memory:g} GB",
                seconds(ours.get("seed"), words),
                seconds(ours.get("prompt"), words),
                gigabytes(ours),
                *(seconds(predicted.get(str(bus)), words) for bus in BUSES[::-1]),
                seconds(native.get("seed"), words),
            ]
        )
    buses = [words["at"].format(bus) for bus in BUSES[::-1]]
    head = [words["memory"], words["seed"], words["prompt"], words["copied"], *buses, words["native"]]
    figure = f"![{words['by memory']}](docs/images/served_by_memory.svg)"
    told = f"\n{words['predicted']}\n" if any(row[4] for row in rows) else ""
    return f"{figure}\n\n{table(head, rows)}{told}"


def everything(measured: Measured, words: dict[str, str]) -> str:
    """A table of all measured rows, with their flags."""
    rows = []
    for row in sorted(measured.all, key=_order):
        memory = words["all"] if row["memory"] is None else f"{row['memory']:g} GB"
        who = words["ours"] if row["who"] == "cold" else words[row["who"]]
        name = " ".join([who, *(f"`{flag}`" for flag in row["flags"])])
        name += f", {words['cold']}" if row["who"] == "cold" else ""
        quantities = [seconds(row.get(quantity), words) for quantity in ("seed", "prompt", "png")]
        quantities.append("" if compiles(row) else seconds(row.get("first"), words))
        predicted = row.get("predicted", {})
        quantities += [gigabytes(row), *(seconds(predicted.get(str(bus)), words) for bus in BUSES[::-1])]
        failed = "failed" if "error" in row else ""
        rows.append([name, row["comfyui"] or "", memory, *quantities, failed])
    buses = [words["at"].format(bus) for bus in BUSES[::-1]]
    head = [
        words["nodes"],
        "ComfyUI",
        words["memory"],
        words["seed"],
        words["prompt"],
        words["png"],
        words["first"],
    ]
    return f"{place(measured, words)}\n\n{table([*head, words['copied'], *buses, ''], rows)}"


def promises(measured: Measured, words: dict[str, str]) -> str:
    head = ["ComfyUI", "what", "measured", "target", ""]
    return table(head, served_targets.compared(measured.all))


BLOCKS: dict[str, Callable[[Measured, dict[str, str]], str]] = {
    "pitch": pitch,
    "whole": whole,
    "memory": by_memory,
    "everything": everything,
    "promises": promises,
}


def _order(row: Row) -> tuple[Any, ...]:
    version = [-number for number in served_targets.numbers(row["comfyui"] or "0")]
    who = {"cold": -1}.get(row["who"], ORDER.index(row["who"]) if row["who"] in ORDER else 9)
    return row["who"] == "headless", version, -(row["memory"] or 1e9), row["flags"], who


def place(measured: Measured, words: dict[str, str]) -> str:
    """Card, versions and date, from the newest row that has them."""
    row = max((row for row in measured.rows if row["comfyui"]), key=lambda row: row["date"])
    told = {
        "device": card(row),
        "torch": row["torch"].partition("+")[0],
        "date": date.fromisoformat(row["date"][:10]).strftime(words["date"]),
        "versions": ", ".join(measured.versions),
        "allocator": row["allocator"],
    }
    return words["place"].format(**told)


def card(row: Row) -> str:
    """The card's name, such as NVIDIA H200."""
    return row["device"].partition(" ")[2] or row["device"]


def seconds(value: float | None, words: dict[str, str]) -> str:
    return "" if value is None else words["s"].format(f"{value:.2f}" if value < 3 else f"{value:.1f}")


def gigabytes(row: Row) -> str:
    return f"{row['copies']['gb']:.2f} GB" if "copies" in row else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, without columns that are empty."""
    filled = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]

    def line(cells: list[str]) -> str:
        return "".join(f"| {cells[i]} " if cells[i] else "| " for i in filled) + "|\n"

    return "".join([line(head), f"|{'---|' * len(filled)}\n", *map(line, rows)])


def draw(measured: Measured, folder: Path) -> None:
    several = len(measured.versions) > 1
    values = {}
    for who in ORDER:
        for version in measured.versions if who != "headless" else [None]:
            row = measured.find(who, version)
            if "seed" in row:
                name = ENGLISH[who] if who != "mixed" else "ComfyUI's samplers on this pack's MODELs"
                values[f"{name}, {version}" if several and version else name] = row["seed"]
    fastest_first = dict(sorted(values.items(), key=lambda item: item[1]))
    own = [name for name in values if not name.startswith(ENGLISH["native"])]
    title = "A picture in ComfyUI as it comes, a new seed"
    bars(title, fastest_first, "s", folder / "served.svg", own, left=330)
    limits = measured.limits()
    if limits:
        panels = {}
        for version in measured.versions:
            series = {
                ENGLISH[who]: [
                    (memory or ALL, row["seed"])
                    for memory in [*limits[::-1], None]
                    if "seed" in (row := measured.find(who, version, memory))
                ]
                for who in ("ours", "native")
            }
            panels[f"seconds, {version}"] = {name: points for name, points in series.items() if points}
        curves("By the card's memory", panels, "GB", folder / "served_by_memory.svg", {ALL: "all"})


def fill(text: str, measured: Measured, words: dict[str, str], images: str) -> str:
    """The page with its blocks filled anew; `images`: relative path from the page to the pictures."""

    def block(match: re.Match[str]) -> str:
        body = BLOCKS[match.group(2)](measured, words).replace("docs/images/", images)
        return f"{match.group(1)}\n{body}\n{match.group(3)}" if body else f"{match.group(1)}{match.group(3)}"

    return BLOCK.sub(block, text)


PAGES = {
    PACK / "README.md": (ENGLISH, "docs/images/"),
    PACK / "README.ja.md": (JAPANESE, "docs/images/"),
    PACK / "docs" / "performance.md": (ENGLISH, "images/"),
    PACK / "docs" / "ja" / "performance.md": (JAPANESE, "../images/"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    files = parser.parse_args().files
    if files:
        kept = [{name: value for name, value in row.items() if "_profile" not in name} for row in read(files)]
        write_file(MEASURED, json.dumps({"rows": kept}, indent=1, ensure_ascii=False) + "\n")
    measured = Measured(read([MEASURED]))
    draw(measured, IMAGES)
    for page, (words, images) in PAGES.items():
        write_file(page, fill(page.read_text(encoding="utf-8"), measured, words, images))
        print(page.relative_to(PACK))


if __name__ == "__main__":
    main()
