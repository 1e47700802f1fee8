"""The estimates of activation memory are never below what a forward pass takes, and at most half above it."""

import pytest
import torch

from cascade_nodes.cascade_core import ControlNet, Previewer, SemanticCompressor, StageA, StageB, StageC
from cascade_nodes.cascade_core.networks import activations, stage_a
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.tests.core.live_bytes import LiveBytes

UNET = {"kernel_size": 3, "c_r": 64, "patch_size": 1, "t_conds": ["sca"]}
STAGE_C = UNET | {
    "c_in": 16, "c_out": 16, "c_cond": 128, "c_hidden": [128, 128], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]],
    "block_repeat": [[1, 1], [1, 1]], "level_config": ["CTA", "CTA"], "c_clip_text": 64, "c_clip_text_pooled": 64,
    "c_clip_img": 32, "c_clip_seq": 4, "dropout": [0, 0], "self_attn": True, "switch_level": [False],
}  # fmt: skip
STAGE_B = UNET | {
    "c_in": 4, "c_out": 4, "patch_size": 2, "c_cond": 64, "c_hidden": [64, 128], "nhead": [-1, 2],
    "blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [1, 1]], "level_config": ["CT", "CTA"], "c_clip": 64,
    "c_clip_seq": 4, "c_effnet": 16, "c_pixels": 3, "dropout": [0, 0], "self_attn": True,
}  # fmt: skip
STAGES = [["fused", 1, 3, 1, 24, 1], ["fused", 4, 3, 2, 48, 1], ["mbconv", 4, 3, 2, 64, 1]]


def measured(network, *inputs, call=None):
    """Values alive at the peak of one forward pass."""
    network.eval().requires_grad_(False)
    with torch.inference_mode(), LiveBytes(network) as live:
        (call or network)(*inputs)
    return live.peak / 4


def check(estimate, peak):
    assert peak <= estimate <= 1.5 * peak


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 24, 24), (2, 32, 16), (4, 12, 12)])
def test_stage_c(batch, height, width):
    network = StageC.from_config(STAGE_C)
    text, pooled, image = torch.randn(batch, 77, 64), torch.randn(batch, 1, 64), torch.zeros(batch, 1, 32)
    peak = measured(network, torch.randn(batch, 16, height, width), torch.rand(batch), text, pooled, image)
    check(activations.stage_c(network.config, batch, height, width, 77 + 4 + 4), peak)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (2, 64, 32)])
def test_stage_b(batch, height, width):
    network = StageB.from_config(STAGE_B)
    effnet = torch.randn(batch, 16, height // 10, width // 10)
    peak = measured(
        network, torch.randn(batch, 4, height, width), torch.rand(batch), effnet, torch.randn(batch, 1, 64)
    )
    check(activations.stage_b(network.config, batch, height, width), peak)


@pytest.mark.parametrize("at_once", [stage_a.HIDDEN_VALUES, 1 << 18, 1 << 16])
@pytest.mark.parametrize("batch", [1, 2])
def test_stage_a_both_ways(batch, at_once, monkeypatch):
    for module in (stage_a, activations):  # as a larger picture is
        monkeypatch.setattr(module, "HIDDEN_VALUES", at_once)
    network = StageA.from_config({"levels": 2, "bottleneck_blocks": 3, "c_hidden": 64, "codebook_size": 16})
    estimate = activations.stage_a(network.config, batch, 32, 24)
    check(estimate, measured(network, torch.randn(batch, 4, 32, 24), call=network.decode))
    check(estimate, measured(network, torch.rand(batch, 3, 128, 96), call=network.encode))


CLIP = {"num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 64}


@pytest.mark.parametrize(
    ("width", "inner", "heads", "rows"), [(128, 512, 2, 2), (64, 96, 1, 8), (320, 1280, 5, 3)]
)
def test_text_encoder(width, inner, heads, rows):
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "vocab_size": 100,
    }
    network = build_text_model({**CLIP, **config})
    tokens = torch.randint(0, 99, (rows, 77))
    mask = torch.arange(77) < torch.randint(1, 77, (rows, 1))
    peak = measured(network, call=lambda: network.text_model(input_ids=tokens, attention_mask=mask.long()))
    check(activations.clip_encoder(network.config, rows, 77), peak)


def test_image_encoder():
    config = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
    network = build_vision_model({**CLIP, **config, "image_size": 56, "patch_size": 7})
    peak = measured(network, torch.randn(3, 3, 56, 56))
    check(activations.clip_encoder(network.config, 3, 65), peak)


def test_compressor():
    network = SemanticCompressor.from_config({"stem": 24, "stages": STAGES, "c_last": 64})
    check(activations.compressor(network.config, 2, 192, 128), measured(network, torch.rand(2, 3, 192, 128)))


def test_previewer():
    network = Previewer.from_config({"c_hidden": 64})
    check(activations.previewer(network.config, 2, 12, 8), measured(network, torch.randn(2, 16, 12, 8)))


@pytest.mark.parametrize(
    ("config", "channels", "side"),
    [
        ({"stem": 24, "stages": STAGES, "c_last": 64}, 3, 192),
        (
            {
                "bottleneck_mode": "large",
                "c_in": 16,
                "c_wide": 256,
                "c_hidden": 64,
                "layers": 2,
                "c_last": 64,
            },
            16,
            24,
        ),
        ({"bottleneck_mode": "simple", "c_in": 32}, 32, 24),
    ],
)
def test_controlnet(config, channels, side):
    network = ControlNet.from_config({"c_proj": 32, "proj_blocks": [0, 2], **config})
    estimate = activations.controlnet(network.config, 1, side, side)
    check(estimate, measured(network, torch.rand(1, channels, side, side)))
