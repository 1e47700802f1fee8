"""Reads docstrings for the reference: lines of `name   meaning` become a list, everything else is Markdown as it is."""

import re

from griffe import Extension

# A name at the beginning of a line, two spaces or more, and its meaning, with the lines that go on below it.
COLUMNS = re.compile(r"(?:^[\w.*, ]*?\w\*? {2,}\S.*\n?(?:^ {3,}\S.*\n?)*)+", re.MULTILINE)
ROW = re.compile(r"^([\w.*, ]*?\w\*?) {2,}(?=\S)", re.MULTILINE)


def with_lists(docstring: str) -> str:
    return COLUMNS.sub(lambda table: "\n" + ROW.sub(r"- `\1` ", table[0]), docstring)


class ColumnsAsLists(Extension):
    def on_object(self, *, obj, **_) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)
