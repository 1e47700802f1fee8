"""docs/tasks/lora.md has a row for each dialect of LoRA."""

import re
from pathlib import Path

from cascade_nodes.cascade_core.adapters import DIALECTS

PAGE = Path(__file__).parents[2] / "docs" / "tasks" / "lora.md"


def test_every_dialect_has_its_row():
    table = PAGE.read_text(encoding="utf-8").partition("| dialect |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(DIALECTS)
