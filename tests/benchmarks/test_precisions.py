"""benchmarks/precisions.py with tiny networks on the processor."""

import json
from pathlib import Path

from cascade_nodes.tests.benchmarks.test_gpu import run


def test_each_precision_is_timed_on_the_same_files(tmp_path: Path):
    path = tmp_path / "precisions.json"
    printed = run("precisions.py", "--toy", "--runs", "1", "--dtypes", "fp32,fp16", "--json", str(path))
    assert "| fp16 " in printed
    results = json.loads(path.read_text(encoding="utf-8"))["dtypes"]
    assert [len(result["times"]) for result in results.values()] == [1, 1]
    assert 0 < results["fp16"]["distance"] < 0.01
