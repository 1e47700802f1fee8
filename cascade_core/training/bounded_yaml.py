"""PyYAML's safe loader with bounds on the depth of nesting and on the number of values, counting aliases.

It refuses numbers that YAML 1.1 reads in base 8 or 60, which people do not expect, repeated names, and names that are
not text.
"""

import re
from typing import Any

import yaml

from ..errors import CascadeError, printable, quoted

MAX_VALUES = 10_000
MAX_DEPTH = 20
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")  # 0100 is 64, 1:30 is 90


class BoundedLoader(yaml.SafeLoader):
    """where: the file's name, for messages."""

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self.where, self.depth, self.count = where, 0, 0
        self.sizes: dict[int, int] = {}  # number of values in a finished node, by its id

    def error(self, mark: Any, problem: str) -> CascadeError:
        return CascadeError(f"{self.where}, line {mark.line + 1}: {problem}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self.count += 1
        if self.depth == MAX_DEPTH:
            raise self.error(mark, "settings are not nested so deeply.")
        self.depth += 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not alias:
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for child in _children(node))
        elif id(node) not in self.sizes:
            raise self.error(mark, "an alias stands within what it stands for.")
        if max(self.count, self.sizes[id(node)]) > MAX_VALUES:
            raise self.error(mark, f"settings have at most {MAX_VALUES:,} values.")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise self.error(key.start_mark, f"{quoted(name)} is not the name of a setting.")
            if name in names:
                raise self.error(key.start_mark, f"{printable(name)} is there twice.")
            names.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = str(self.construct_scalar(node))
        if _OTHER_BASE.fullmatch(text):
            raise self.error(
                node.start_mark, f"{quoted(text)} is not decimal to YAML; write it as a plain decimal number."
            )
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for kind in ("int", "float"):
    BoundedLoader.add_constructor(f"tag:yaml.org,2002:{kind}", BoundedLoader.construct_number)


def _children(node: Any) -> list[Any]:
    """A list's entries, a mapping's keys and values, nothing of a scalar."""
    if isinstance(node.value, str):
        return []
    return [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
