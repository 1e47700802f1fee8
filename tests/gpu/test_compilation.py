"""A card's first forwards, after a process without the card compiled what the meta device said they would launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = [("bf16", "exact"), ("fp16", "exact"), ("bf16", "fp8")]


@pytest.mark.parametrize("config", ["StageCConfig", "StageBConfig", "StageAConfig"])
@pytest.mark.parametrize(("dtype", "precision"), NATIVE)
def test_no_kernel_is_compiled_by_the_first_forward(
    config: str, dtype: str, precision: str, tmp_path: Path, capability: tuple[int, int]
):
    if capability < (8, 9) and precision == "fp8":
        pytest.skip(f"fp8 needs compute capability 8.9, and this card has {capability}")
    program = [sys.executable, "-m", "cascade_nodes.tests.engine.compiled_in_background", config, "--card"]
    result = subprocess.run(
        [*program, "--dtype", dtype, "--precision", precision if config != "StageAConfig" else "exact"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert report.pop("found") > 3
    assert report == {"compiled": 0, "again": False}
