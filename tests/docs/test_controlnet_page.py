"""The pages on ControlNets have every kind of the table."""

from pathlib import Path

from cascade_nodes.cascade_core.hints.kinds import KINDS

TASKS = Path(__file__).parents[2] / "docs" / "tasks"


def test_every_kind_is_on_its_page_with_its_node():
    page = (TASKS / "controlnet.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| ")}
    missing = [
        kind.name
        for kind in KINDS.values()
        if f"| {kind.node} |" not in rows.get(kind.name.replace("_", " "), "")
    ]
    assert missing == []


def test_every_kind_is_a_hint_that_training_offers():
    page = (TASKS / "training.md").read_text(encoding="utf-8")
    row = next(row for row in page.splitlines() if row.startswith("| `hint` |"))
    assert [name for name in KINDS if f"`{name}`" not in row] == []
