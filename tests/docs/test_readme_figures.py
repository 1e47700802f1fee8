"""The seconds in the README are measured ones: each stands in docs/performance.md, in both languages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = r"\d+\.\d+"


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_the_seconds_are_those_of_the_measurements(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    seconds = set(re.findall(rf"({NUMBER}) (?:s\b|秒)", text))
    measured = set(re.findall(NUMBER, (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")))
    assert len(seconds) >= 9
    assert seconds - measured == set()
