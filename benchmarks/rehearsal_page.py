"""Writes the rehearsal's table in docs/performance.md from the results of benchmarks/rehearsal.py.

    python benchmarks/rehearsal_page.py [FILE]

Replaces the text between `<!-- rehearsal -->` and `<!-- end -->`, from benchmarks/measurements/rehearsal.json, which
FILE replaces first.
"""

import json
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

from cascade_nodes.cascade_core.writing import write_file

MEASURED = Path(__file__).parent / "measurements" / "rehearsal.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- rehearsal -->\n).*?(<!-- end -->)", re.DOTALL)
GB = 1e9
HEAD = (
    "cell",
    "pictures",
    "seconds",
    "allocated",
    "reserved",
    "on the card",
    "main memory",
    "mapped files",
)


def table(result: dict[str, Any]) -> str:
    """The table: the machine, a row for each cell, skipped lines, and the reason for an early end."""
    day = date.fromisoformat(result["date"][:10]).strftime("%-d %B %Y")
    card = f"{result['card'] / GB:g} GB of card" if result["card"] else "no card"
    lines = [
        f"Rehearsed on {result['device']}, torch {result['torch'].partition('+')[0]}, {day}: {card}, "
        f"{result['main'] / GB:g} GB of main memory",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
    ]
    lines += [f"| {' | '.join(row(cell))} |" for cell in result["cells"]]
    skipped = [f"`{line}`" for cell in result["cells"] for line in cell["skipped"]]
    if skipped:
        lines += ["", f"Left out, since they need the Internet: {', '.join(skipped)}."]
    if result["failed"]:
        lines += ["", f"**{result['failed']}**"]
    return "\n".join(lines) + "\n"


def row(cell: dict[str, Any]) -> list[str]:
    memory = ("allocated", "reserved", "card", "main", "files")
    figures = [f"{cell[kind] / GB:.2f} GB" if kind in cell else "" for kind in memory]
    return [cell["title"], str(len(cell["pictures"]) or ""), f"{cell['seconds']:.1f} s", *figures]


def fill(page: str, result: dict[str, Any]) -> str:
    return BLOCK.sub(lambda match: f"{match.group(1)}\n{table(result)}\n{match.group(2)}", page)


def main() -> None:
    if sys.argv[1:]:
        write_file(MEASURED, Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = json.loads(MEASURED.read_text(encoding="utf-8"))
    write_file(PAGE, fill(PAGE.read_text(encoding="utf-8"), result))


if __name__ == "__main__":
    main()
