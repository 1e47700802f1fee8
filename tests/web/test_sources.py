"""Strangers' names of files and tokens are never executed: panels show them as text, and the pack serves no address."""

import re

import pytest

from cascade_nodes.tests.comfyui.checkout import PACK

ACTING = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|createContextualFragment|\beval\(|"
    r"new Function|setAttribute|\.(src|href)\s*="
)


@pytest.mark.parametrize("script", sorted(PACK.glob("web/**/*.js")), ids=lambda path: path.name)
def test_panels_write_text_alone(script):
    assert ACTING.findall(script.read_text(encoding="utf-8")) == []


def test_nothing_is_served():
    sources = [path for folder in ("nodes", "cascade_core") for path in (PACK / folder).rglob("*.py")]
    assert len(sources) > 100
    assert [
        path.name for path in (*sources, PACK / "__init__.py")
        if re.search(r"\broutes\b|add_routes|aiohttp|http\.server|socketserver", path.read_text(encoding="utf-8"))
    ] == []  # fmt: skip
