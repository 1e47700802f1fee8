"""Tables of the README are filled from figures, and its places for them are there."""

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.pages import README, TABLES, Row, figures_of, fill_tables, table

EVALUATED = {
    "count": 500,
    "machine": "a GPU",
    "date": "2026-12-01",
    "objects_colour": 0.995,
    "red_objects": 28,
    "pairs_shapes": [0.98, 0.975, 0.984, 3840],
    "proportions_3:2": [0.9, 0.85, 0.93, 166],
    "proportions_16:9": [0.9, 0.85, 0.93, 166],
    "proportions_9:16": [0.9, 0.85, 0.93, 166],
    "pairs_by": {"pair": {"white diamond": [0.9, 0.8, 0.95, 60], "red star": [1.0, 0.94, 1.0, 60]}},
}


def test_a_table_has_the_rows_of_which_figures_are_there():
    row = figures_of(EVALUATED)
    row["half"] = 250
    text = table("evaluate", row)
    assert "| objects in the right colour | 99.5 % |" in text
    assert "| red objects for 250 prompts of one object without a colour | 28 |" in text
    assert "half of them small | 98.0 % (97.5 % to 98.4 %) |" in text
    assert "| white diamond 0.90 (0.80-0.95), red star" in text
    assert "90.0 % (85.0 % to 93.0 %); 90.0 %" in text
    assert text.endswith("500 prompts, a GPU, 2026-12-01.")
    assert "relations" not in text


def test_tasks_figures_have_their_task_before_their_names():
    row = figures_of({"image_to_image": {"psnr_at_0.2_db": 31.9}, "variation": {"right": 0.865}})
    assert row.fill("{image_to_image_psnr_at_0.2_db:.1f} dB, {variation_right:.1%}") == "31.9 dB, 86.5 %"
    assert row.fill("{image_to_image_psnr_at_0.5_db:.1f}") is None


def test_the_readme_has_a_place_for_each_table():
    page = README.read_text("utf-8")
    rows = {name: Row(figures_of(EVALUATED), half=250) for name in TABLES}
    filled = fill_tables(page, rows)
    assert filled.count("a GPU, 2026-12-01.") == 2
    assert fill_tables(filled, rows) == filled
    assert filled.startswith(page[:500])
    assert filled.endswith(page[-500:])
    with pytest.raises(CascadeError, match="has 0 places for the table evaluate"):
        fill_tables("", rows)
