"""Writes docs/tasks/training_settings.md from the settings' types, docstrings and comments.

python -m cascade_nodes.tests.docs.training_settings
"""

import ast
import dataclasses
import inspect
import textwrap
import tokenize
import types
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cascade_nodes.cascade_core.training import settings
from cascade_nodes.cascade_core.training.ranges import Range

PAGE = Path(__file__).parents[2] / "docs" / "tasks" / "training_settings.md"
SECTIONS: dict[str, Any] = {
    "data": settings.DataSettings,
    "data.sets": settings.DataSetSettings,
    "models": settings.ModelSettings,
    "train": settings.TrainSettings,
    "objective": settings.ObjectiveSettings,
    "validation": settings.ValidationSettings,
    "output": settings.OutputSettings,
    "output.prompts": settings.SamplePrompt,
    "lora": settings.LoRASettings,
    "controlnet": settings.ControlNetSettings,
    "finetune": settings.FinetuneSettings,
    "stage_b": settings.StageBSettings,
    "tokens": settings.TokenSettings,
}
LISTS = ("data.sets", "output.prompts", "tokens")
WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    type(None): "null",
}


def page() -> str:
    parts = [
        "# All settings of a training\n",
        "Written by `python -m cascade_nodes.tests.docs.training_settings` from the "
        "[settings](../../cascade_core/training/settings) themselves. How to train, and what the settings are for: "
        "[training.md](training.md). A *share* is a number from 0 to 1.\n",
    ]
    for name, cls in SECTIONS.items():
        parts.append(_section(name, cls))
    return "\n".join(parts)


def _section(name: str, cls: Any) -> str:
    meanings = comments(cls)
    kinds = get_type_hints(cls, include_extras=True)
    rows = [
        "| "
        + " | ".join(
            map(_cell, (f"`{field.name}`", shown(kinds[field.name]), default(field), meanings[field.name]))
        )
        + " |"
        for field in dataclasses.fields(cls)
    ]
    what = (
        f"## {name}\n\n"
        + ("A list; each entry has these keys. " if name in LISTS else "")
        + _paragraphs(inspect.getdoc(cls) or "")
    )
    return "\n".join([what, "", "| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _paragraphs(text: str) -> str:
    """A docstring as Markdown: its indented or aligned lines stay apart."""
    blocks = [block for block in text.split("\n\n") if block.strip()]
    return "\n\n".join(
        "\n".join(f"- {' '.join(line.split())}" for line in block.splitlines())
        if "   " in block
        else "\n".join(textwrap.wrap(" ".join(block.split()), 120))
        for block in blocks
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def shown(kind: Any) -> str:
    """A type with its range, in words."""
    bounds = [str(each) for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)]
    if bounds:
        kind = get_args(kind)[0]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        parts = [shown(each) for each in arguments if each is not type(None)]
        text = ", or ".join(dict.fromkeys(parts)) + ", or null" * (type(None) in arguments)
    elif origin is Literal:
        text = ", ".join(f"`{each}`" for each in arguments)
    elif origin is tuple:
        text = f"list: {shown(arguments[0])}"
    elif origin is dict:
        text = "names with values"
    elif dataclasses.is_dataclass(kind):
        text = next(
            (f"as `{name}` below" for name, cls in SECTIONS.items() if cls is kind), "names with values"
        )
    else:
        text = WORDS.get(kind, str(kind))
    return f"{text}; {bounds[0]}" if bounds else text


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    return f"`{value}`" if value != "" else "none"


def comments(cls: Any) -> dict[str, str]:
    """What is written beside each field, or above it."""
    source = textwrap.dedent(inspect.getsource(cls))
    notes = {
        token.start[0]: (token.string.lstrip("# "), token.start[1] == 4)
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno):
            continue
        beside = [notes[line][0] for line in range(node.lineno, node.end_lineno + 1) if line in notes]
        above, line = [], node.lineno - 1
        while line in notes and notes[line][1]:
            above.insert(0, notes[line][0])
            line -= 1
        found[node.target.id] = " ".join(above + beside)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
