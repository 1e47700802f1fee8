"""The measured parts of docs/scaling.md: what benchmarks/batch.py and benchmarks/ranks.py have measured on two GPUs.

    python benchmarks/scaling_page.py [batch.json] [ranks.json]

Writes what stands between `<!-- batch -->`, `<!-- arithmetic -->` or `<!-- ranks -->` and `<!-- end -->`, from
benchmarks/measurements, to which the given files are copied first. Rows of training that a file does not have stay as
they were measured before. The page says what is not measured yet.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from cascade_nodes.cascade_core.writing import write_file

MEASURED = Path(__file__).parent / "measurements"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
KINDS = {"runs": "batch", "rows": "ranks"}  # by a key that each file has
BLOCK = re.compile(r"(<!-- (batch|arithmetic|ranks) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "finetune": "Stage C whole, FSDP2",
    "finetune_b": "Stage B whole, FSDP2",
    "lora": "LoRA",
    "controlnet": "ControlNet",
}
# On an H200, of docs/performance.md, in seconds: a picture with a new prompt, its PNG, the first one after starting
PICTURE, PNG, FIRST = 0.67, 0.12, 8.2
MODELS = 11.8  # GB in 16 bits
DRIVER = 0.032  # seconds that the driver takes to write a row and its PNG, flushed to the disk
PNG_MB = 3.1  # at most: three bytes a pixel


def batch(measured: dict[str, Any] | None) -> str:
    if measured is None or "times" not in measured:
        return wrapped(
            "`benchmarks/batch.py` compares several workers with one process, in rows a second. The target is 1.6 "
            "times as many with two workers on two cores, and 1.9 times with two cards. It has not been run on two "
            "cards yet."
        )
    one, many = (f"{run['rows_per_second']:.2f}" for run in measured["runs"])
    how = {"shares": "`--shard`", "Ray": "Ray"}[measured["how"]]
    return wrapped(
        f"Measured by `benchmarks/batch.py` ({measured['device']}, {measured['graph']}, without loading): one process "
        f"makes {one} rows a second. {measured['runs'][1]['workers']} processes with a card each, by {how}, make "
        f"{many}: **{measured['times']:.2f} times** as many (target {measured['target']:.1f})."
    )


ARITHMETIC = """
Measured on an H200: {said} ([performance.md](performance.md)). So a card makes {hourly} rows an hour. The
models are {models} GB in 16 bits, and the first picture of a ComfyUI server comes after {first} s. A PNG of that
size is at most {png} MB (three bytes a pixel). The driver needs {driver} s to write a row and its PNG and to flush
them to the disk (two shared EPYC cores and their disk). Everything below is computed from these figures.

- **One driver** writes 1 / {driver} = {driven} rows a second. That is enough for at least {cards} H200s. For more
cards, use one driver for each machine: `--shard k/N` with `--workers 8` in each. N drivers share the folder and
nothing else.
- **Models** go to each machine once, and into main memory once: eight workers of a machine map the same
files. A thousand cards are 125 machines: 125 × {models} GB = {all} GB. One server with 100 Gbit/s sends this in
{all} GB / 12.5 GB/s = {sent} s. From Hugging Face, with 1 Gbit/s for each machine, it takes {hub} s for all at once.
- **Pictures.** A thousand cards make {made} files a second, at most {gb} GB. In an hour that is {millions} million
files, at most {tb} TB. A shared folder that takes {made} new files a second needs a parallel file system. With a
local disk, each machine writes {local} files and {local_mb} MB a second, to be copied away later. One folder
should not hold millions of files. Put a folder into the column `name` of the table: `0421/000017`.
- **The list.** A line of `batch.jsonl` has some 150 bytes. {millions} million rows are {listed} GB in an
hour, and every process that starts reads all of it. Cut such a table into several batches.
- **Failures.** If a card is lost once in a thousand hours, a thousand cards lose one an hour. This costs one row
({row} s) and the time until the new card's first picture: some {first} s, if it takes as long as in a server.
- **Slow cards.** With fixed shares, the batch ends with its slowest card. With Ray, the last card ends at most one row
after the others.
"""


def arithmetic(measured: dict[str, Any] | None) -> str:
    """Half a page, computed from one card's rows a second and the numbers above."""
    rate = 1 / (PICTURE + PNG)
    said = (
        f"a picture of 1024 × 1024 in 20 + 10 steps takes {PICTURE} s with a new prompt, and its PNG {PNG} s"
    )
    if measured is not None and "times" in measured and "H200" in measured["device"]:
        rate = measured["runs"][0]["rows_per_second"]
        said = (
            f"one process of `cascade batch` makes {rate:.2f} rows a second of 1024 × 1024 in 20 + 10 steps"
        )
    made, total = 1000 * rate, 125 * MODELS  # a second, and GB
    numbers = {
        "said": said,
        "hourly": f"{rate * 3600:,.0f}",
        "models": MODELS,
        "first": FIRST,
        "png": PNG_MB,
        "driver": DRIVER,
        "driven": int(1 / DRIVER),
        "cards": int(1 / DRIVER / rate),
        "all": f"{total:,.0f}",
        "sent": f"{total / 12.5:.0f}",
        "hub": f"{MODELS * 8:.0f}",
        "made": f"{made:,.0f}",
        "gb": f"{made * PNG_MB / 1000:.1f}",
        "millions": f"{made * 3600 / 1e6:.1f}",
        "tb": f"{made * 3600 * PNG_MB / 1e6:.0f}",
        "local": f"{8 * rate:.0f}",
        "local_mb": f"{8 * rate * PNG_MB:.0f}",
        "listed": f"{made * 3600 * 150 / 1e9:.1f}",
        "row": f"{1 / rate:.1f}",
    }
    return wrapped(ARITHMETIC.format(**numbers))


def ranks(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "What two cards give is not measured yet (`benchmarks/ranks.py`).\n"
    lines = [
        f"Measured by `benchmarks/ranks.py` on two {measured['device']}:",
        "",
        "| | batch on each card | steps a second on one card | on two cards | pictures a second, two cards ÷ one | "
        "peak GB on one card | on each of two cards | peak GB, each of two ÷ one | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in measured["rows"].items():
        one, two = row["one"] or {}, row["two"] or {}
        speeds = [f"{each['steps_per_second']:.3g}" if each else "failed" for each in (one, two)]
        peaks = [f"{each['peak_gb']:.1f}" if each else "" for each in (one, two)]
        times = f"{row['times']:.2f} (target {row['asked']})" if "times" in row else ""
        memory = f"{row['memory']:.2f}" if row.get("memory") else ""
        memory += f" (target at most {row['asked_memory']})" if memory and row["asked_memory"] else ""
        name, batch = NAMES[key.partition(":")[0]], str(row["batch"])
        lines.append(f"| {' | '.join([name, batch, *speeds, times, *peaks, memory, row['date']])} |")
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs and items of a list in lines of the page's width."""
    pieces = re.split(r"\n(?=\n|- )", text.strip("\n"))
    lines = [textwrap.fill(piece.strip("\n"), 118, subsequent_indent="  " * piece.startswith("- "),
                           break_on_hyphens=False, break_long_words=False) for piece in pieces]  # fmt: skip
    joined = lines[0]
    for piece, line in zip(pieces[1:], lines[1:], strict=True):
        joined += ("\n\n" if piece.startswith("\n") else "\n") + line
    return joined + "\n"


def fill(page: str, measured: dict[str, dict[str, Any] | None]) -> str:
    """The page with its blocks written anew."""
    found = {
        "batch": batch(measured["batch"]),
        "arithmetic": arithmetic(measured["batch"]),
        "ranks": ranks(measured["ranks"]),
    }
    return BLOCK.sub(lambda match: f"{match[1]}{found[match[2]]}{match[3]}", page)


def together(before: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A newer measurement's rows first, then those of an older one, where the newer has no figures on two GPUs."""
    kept = {
        key: row
        for key, row in before["rows"].items()
        if key not in measured["rows"] or (row.get("two") and not measured["rows"][key].get("two"))
    }
    return {**measured, "rows": measured["rows"] | kept}


def measurements() -> dict[str, dict[str, Any] | None]:
    files = {kind: MEASURED / f"{kind}.json" for kind in KINDS.values()}
    return {
        kind: json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        for kind, file in files.items()
    }


def main() -> None:
    for given in sys.argv[1:]:
        text = Path(given).read_text(encoding="utf-8")
        kind = next(kind for key, kind in KINDS.items() if key in json.loads(text))
        if kind == "ranks" and (before := measurements()[kind]):
            text = json.dumps(together(before, json.loads(text)), indent=1) + "\n"
        write_file(MEASURED / f"{kind}.json", text)
    write_file(PAGE, fill(PAGE.read_text(encoding="utf-8"), measurements()))


if __name__ == "__main__":
    main()
