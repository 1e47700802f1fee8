"""Files loaded where ComfyUI makes its layers without weights (dynamic VRAM, on NVIDIA cards the newest's default)."""

import pytest

NETWORKS = (
    "text",
    "stage_c",
    "stage_c with a ControlNet",
    "stage_b",
    "stage_a",
    "compressor",
    "image encoder",
)


@pytest.mark.parametrize("network", NETWORKS)
def test_computes_the_same(measured, network):
    assert measured[network] == 0
