"""Writes what other languages fall back to: `python -m cascade_nodes.tests.web.help_copies`.

The front end looks for a page in the interface's language, then for one of no language, and knows no relation between
languages: traditional Chinese gets the simplified texts, all others the English pages. To be called after one changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cascade_nodes.cascade_core.writing import write_file

ROOT = Path(__file__).parents[2]
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
TRADITIONAL = "zh-TW"


def copies() -> Iterator[tuple[Path, Path]]:
    """(file, its copy): the texts of the interface, and the page of every node."""
    for path in sorted((LOCALES / "zh").iterdir()):
        yield path, LOCALES / TRADITIONAL / path.name
    for folder in sorted(path for path in DOCS.iterdir() if path.is_dir()):
        yield folder / "zh.md", folder / f"{TRADITIONAL}.md"
        yield folder / "en.md", DOCS / f"{folder.name}.md"


def main() -> None:
    """Writes those that are not there, or say something else."""
    (LOCALES / TRADITIONAL).mkdir(exist_ok=True)
    for page, copy in copies():
        text = page.read_text(encoding="utf-8")
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            write_file(copy, text)


if __name__ == "__main__":
    main()
