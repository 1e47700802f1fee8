"""benchmarks/batch.py counts rows while all workers work; benchmarks/scaling_page.py puts its figures on the page."""

import json
import os

import pytest


def made(folder, ends: dict[str, list[float]]):
    """A batch by shares whose rows ended at these seconds, by worker."""
    for number, (worker, seconds) in enumerate(ends.items(), 1):
        lines = []
        for each in seconds:
            picture = folder / f"{worker}_{each}.png"
            picture.touch()
            os.utime(picture, (each, each))
            lines.append(json.dumps({"name": picture.stem, "pictures": [picture.name], "worker": worker}))
        (folder / f"batch.{number}-of-{len(ends)}.jsonl").write_text("\n".join(lines))
    return folder


def test_rows_are_counted_while_all_workers_work(module, tmp_path):
    found = module("batch").steady(made(tmp_path, {"a": [1, 2, 3, 4, 5, 6], "b": [3, 4, 5, 6, 7, 8]}), 2)
    assert (found["workers"], found["steady_rows"], found["rows_per_second"]) == (2, 6, 2.0)


def test_too_few_rows_are_said(module, tmp_path):
    batch = module("batch")
    with pytest.raises(batch.FailedError, match="give more --rows"):
        batch.steady(made(tmp_path, {"a": [1, 2, 3], "b": [3, 4]}), 2)


def test_the_page_holds_what_was_measured(module):
    page = module("scaling_page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text, page.measurements()) == text, "run benchmarks/scaling_page.py"


def test_the_page_takes_its_figures_from_the_measurements(module):
    page = module("scaling_page")
    runs = [{"workers": count, "rows_per_second": 1.25 * count} for count in (1, 2)]
    device, graph = "NVIDIA H200", "text_to_image_published.json"
    batch = {"device": device, "graph": graph, "how": "shares", "target": 1.9, "runs": runs, "times": 2.0}
    one = {"steps_per_second": 1.5, "peak_gb": 90.0}
    row = {"batch": 24, "date": "2026-12-01", "asked": 1.8, "asked_memory": 0.6, "one": one, "two": None}
    ranks = page.together({"device": device, "rows": {"finetune:24": {}, "lora:4": {**row, "batch": 4}}}, {
        "device": device, "rows": {"finetune:24": row},
    })  # fmt: skip
    filled = page.fill(page.PAGE.read_text(encoding="utf-8"), {"batch": batch, "ranks": ranks})
    assert "**2.00 times** as many (target 1.9)" in filled
    assert "one process of `cascade batch` makes 1.25 rows a second" in filled
    assert "at least 25 H200s" in filled
    assert (
        "| Stage C whole, FSDP2 | 24 | 1.5 | failed |  | 90.0 |  |  | 2026-12-01 |\n| LoRA | 4 | 1.5"
        in filled
    )
    whole = {**row, "two": one}
    cut = page.together({"rows": {"lora:4": whole}}, {"rows": {"lora:4": row, "finetune:24": row}})
    assert cut["rows"] == {"lora:4": whole, "finetune:24": row}
