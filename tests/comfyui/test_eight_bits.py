"""8-bit weights in ComfyUI: the layers' own, as without it; patched from their originals; saved with their scales."""

import pytest

CASES = pytest.mark.parametrize("case", ["stage_c, fp8", "stage_c, int8", "stage_b, fp8", "stage_b, int8"])
EXACT = 1e-5  # where both add in float32, but not all in the same order
ROUNDED = {"fp8": 0.06, "int8": 0.03}  # where a weight, or what it is multiplied with, is rounded anew


@CASES
def test_as_without_comfyui(measured, case):
    found = measured[case]
    assert found["other weights"] == []
    assert found["layers"] > 30
    assert found["as without ComfyUI"] <= EXACT
    assert found["LoRA, as without ComfyUI"] <= EXACT
    assert found["the LoRA's effect"] > 0.05
    assert found["after the LoRA"] == 0


@CASES
def test_sizes(measured, case):
    """The scales count."""
    sizes = measured[case]["sizes"]
    assert len(set(sizes.values())) == 1, sizes


@CASES
def test_merges_get_the_originals(measured, case):
    assert measured[case]["not the originals"] == []


@CASES
def test_saved(measured, case):
    """In fp8 a matrix is saved with one scale, as ComfyUI's own products take it; in int8 to the bit as it ran."""
    found = measured[case]
    assert found["stated"] > 30
    assert found["scales"] == (["one"] if "fp8" in case else ["(rows, 1)"])
    rounded = ROUNDED[case.split(", ")[1]]
    assert found["saved, as it ran"] <= (rounded if "fp8" in case else EXACT)
    assert found["saved, without ComfyUI"] <= EXACT
    assert found["saved again"] == []
    assert found.get("ComfyUI's own network", 0) <= rounded


@CASES
def test_without_a_placement(measured, case):
    """There is none on the processor, on other cards than NVIDIA's and with --highvram."""
    found = measured[case]
    assert found["in part"] <= 0.01
    assert found["hooks' effect"] > 0.05
    assert found["hooks again"] == found["after hooks"] == 0
