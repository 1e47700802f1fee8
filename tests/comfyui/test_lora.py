"""LoRAs and learned tokens in ComfyUI: as its own loader applies them, as without it, and gone without a trace."""

import numpy as np
import pytest
import torch

from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank, write_adapter
from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.tiny import TEXT_WIDTH

LORA, FILE = "20", "tiny.safetensors"


def test_what_must_make_no_difference(measured):
    differences = {name: value for name, value in measured.items() if name.startswith("same")}
    assert len(differences) == 54
    # A LoRA and its opposite leave rounding in the weights, which the steps make larger.
    for dtype in (torch.float32, torch.float64):
        weights = differences.pop(f"same: one and its opposite, weights in {dtype}")
        assert weights <= torch.finfo(dtype).eps
    assert differences.pop("same: one and its opposite") <= 5e-4
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}


def test_what_must_make_one(measured):
    differences = {name: value for name, value in measured.items() if name.startswith("other")}
    assert len(differences) == 9
    assert {name: value for name, value in differences.items() if not value >= 1e-2} == {}


def test_what_must_leave_no_trace(measured):
    differences = {name: value for name, value in measured.items() if name.startswith("none")}
    assert len(differences) == 5
    assert set(differences.values()) == {0.0}


@pytest.fixture
def lora(server):
    """A LoRA of the tiny cascade with a token, among the server's."""

    def low_rank(width, seed):
        random = torch.Generator().manual_seed(seed)
        return LowRank(torch.randn(2, width, generator=random), torch.randn(width, 2, generator=random), 0.5)

    stage_c = {
        f"{way}_blocks.{i}.2.attention.attn.to_v": low_rank(32, i) for way in ("down", "up") for i in (0, 1)
    }
    tokens = (LearnedToken("[sun]", 0.05 * torch.ones(2, TEXT_WIDTH)),)
    path = server.base / "models" / "loras" / FILE
    write_adapter(path, Adapter(FILE, "onetrainer", stage_c, tokens=tokens), "onetrainer")
    yield path
    path.unlink()


def graph_with(file, strength=1.0):
    """The tiny graph with a LoRA, and its token in the prompt."""
    apply = node(
        "CascadeLoRAApply",
        model=["1", 0],
        clip=["4", 0],
        file=file,
        strength_model=strength,
        strength_clip=strength,
    )
    prompt = "a (red:1.2) [sun] star"
    return tiny({LORA: apply, "7.model": [LORA, 0], "5.clip": [LORA, 1], "5.positive": prompt})


def test_same_picture_as_without_comfyui(client, right_picture, lora):
    execution = client.run(graph_with(FILE))
    assert execution.error is None
    (picture,) = client.pictures(execution)
    assert np.abs(picture.astype(int) - right_picture(graph_with(str(lora)))).max() <= 1
    (texts,) = [data["output"]["text"] for data in execution.of("executed") if data["node"] == LORA]
    note = "Write [sun] in the prompt."
    assert texts == [f"{FILE} (onetrainer): 4 layers of Stage C, rank 2, 1 learned token ([sun])", note]
    assert execution.texts == []  # it is said once, in the panel
    without = tiny({"5.positive": "a (red:1.2) [sun] star"})
    (plain,) = client.pictures(client.run(without))
    assert np.abs(plain.astype(int) - picture).max() > 1
    assert np.abs(plain.astype(int) - right_picture(without)).max() <= 1  # nothing is left of it
