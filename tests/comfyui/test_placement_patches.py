"""Patched weights give the same latents wherever they are, and those of ComfyUI's own patcher."""

from typing import Any

import pytest

EXACT = 1e-5  # where both add in float32, but not all in the same order
BF16, FP8 = 0.03, 0.3  # where a weight is rounded once or twice


def bound(case: str) -> float:
    return BF16 if "bf16" in case or "fp16" in case else FP8 if "fp8" in case else EXACT


@pytest.fixture
def found(measured: dict[str, Any]):
    """Gives what one scenario found."""

    def of(scenario: str) -> dict[str, Any]:
        assert "error" not in measured[scenario], measured[scenario]["error"]
        return measured[scenario]

    return of


def test_patched_weights(found):
    for case, result in found("latents").items():
        assert result["differ"] == [], case
        assert result["from core's"] <= bound(case), case
        assert result["effect"] > 0.05 or case.endswith("none"), case
        whole, least, *_ = result["loaded"]
        assert whole > 0.85, case
        assert least < 0.7 * whole, case


def test_clones_in_turn(found):
    assert found("in turn") == {"stage_c": [], "stage_b": []}


def test_hooks(found):
    for case, result in found("hooks").items():
        assert result["differ"] == [], case
        assert result["from core's"] <= bound(case), case
        assert result["effect"] > 0.05, case
        assert result.get("afterwards as before", True), case


def test_merging(found):
    results = found("merged")
    assert results.pop("second network") == {"changed": []}
    for case, result in results.items():
        assert result["differ"] == [], case
        assert result["from core's"] <= EXACT, case


def test_saving(found):
    for case, result in found("saving").items():
        assert result["checkpoint"] == result["LoRA"] == {}, case
        assert result["later runs"] == [], case
        assert result["tensors"] > 100, case
        assert result["LoRA's tensors"] > 100, case
