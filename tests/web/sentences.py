"""The sentences of nodes, as `{}` stands for each value in them: read from the sources, for their translations.

    python -m cascade_nodes.tests.web.sentences

leads translations on to sentences that were worded anew, and prints these and those that have none yet.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "web" / "sentences"
# What no node says: the command line, Python's own door, and configurations that lie beside a network.
ELSEWHERE = (
    "cascade_core/adapters/dialects.py", "cascade_core/adapters/merge.py", "cascade_core/adapters/write.py",
    "cascade_core/arguments.py", "cascade_core/diffusion/noise.py", "cascade_core/diffusion/samplers.py",
    "cascade_core/engine/", "cascade_core/limits.py", "cascade_core/loaded.py", "cascade_core/making.py",
    "cascade_core/model_files.py", "cascade_core/networks/",
    "cascade_core/pictures.py", "cascade_core/pipeline.py", "cascade_core/placement/pinned.py", "cascade_core/run.py",
    "cascade_core/stages/", "cascade_core/training/", "nodes/hosts/headless/", "nodes/hosts/example_pictures.py",
    "nodes/hosts/notices.py", "nodes/hosts/reporting.py", "nodes/hosts/schema.py",
)  # fmt: skip
FEWEST_WORDS = 3  # of a sentence by itself, beside its values


def sources() -> Iterator[tuple[str, ast.Module]]:
    """The modules of the core and of the nodes, each with its path."""
    for folder in ("cascade_core", "nodes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def tells_of_an_input(node: ast.AST) -> TypeGuard[ast.keyword | ast.Assign]:
    """Whether a text of the schema follows."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", "").endswith("_TOOLTIP")
    return isinstance(node, ast.keyword) and node.arg in ("tooltip", "description")


def texts(tree: ast.Module) -> Iterator[str]:
    """Every text of a module but those that explain: docstrings, tooltips and descriptions."""
    explaining: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            explaining |= {first.value} if isinstance(first, ast.Expr) else set()
        elif tells_of_an_input(node):
            explaining |= set(ast.walk(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("_input"):
            explaining |= {part for value in node.args for part in ast.walk(value)}
        elif isinstance(node, ast.JoinedStr):
            explaining |= {value for value in node.values if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        if node in explaining:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w+\}", "{}", node.value)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values
            )


def is_sentence(text: str) -> bool:
    """Whether a text says something by itself."""
    return text.endswith(".") and " " in text and len(re.findall(r"[A-Za-z]{2,}", text)) >= FEWEST_WORDS


def sentences() -> set[str]:
    """All that a node can show in ComfyUI beside what its schema says."""
    return {
        text
        for path, tree in sources()
        if not path.startswith(ELSEWHERE)
        for text in texts(tree)
        if is_sentence(text)
    }


def words() -> str:
    """All texts of the sources, to look for pieces in."""
    return "\n".join(text for _, tree in sources() for text in texts(tree))


def follow(translations: dict[str, str], said: set[str], everything: str) -> tuple[dict[str, str], list[str]]:
    """Translations by sentences as they are now, and what a translator has to look at.

    A sentence that nobody says any more gives its translation to the most similar new one with as many values.
    """
    new = sorted(said - translations.keys())
    followed, notes = {}, []
    for text, translation in translations.items():
        gone = any(piece.strip(" .,;:()") not in everything for piece in text.split("{}"))
        heirs = [one for one in new if one.count("{}") == text.count("{}")] if gone else []
        heir = next(iter(difflib.get_close_matches(text, heirs, n=1)), None)
        if heir:
            new.remove(heir)
            notes.append(f"{text}\n    is now: {heir}\n    {translation}")
        if heir or not gone:
            followed[heir or text] = translation
    return followed, notes + [f"not translated: {text}" for text in new]


def main() -> None:
    """Writes the tables anew."""
    said, everything = sentences(), words()
    for path in sorted(TABLES.iterdir()):
        tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tables["sentences"], notes = follow(tables["sentences"], said, everything)
        path.write_text(json.dumps(tables, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sys.stdout.write("\n".join([path.name, *notes, ""]))


if __name__ == "__main__":
    main()
