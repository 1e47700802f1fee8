"""Semantic compressor: parity with the published network, other sizes, inference from shapes, training."""

import pytest
import torch

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.networks.compressor import SemanticCompressor, normalise
from cascade_nodes.cascade_core.networks.efficientnet import BatchNorm2d, stochastic_depth
from cascade_nodes.cascade_core.networks.inference import infer_compressor, published_strides
from cascade_nodes.tests.golden_weights import (
    fill_hashed,
    manifest_shapes,
    module_shapes,
    read_golden,
    relative_error,
)

SMALL = {
    "c_latent": 16,
    "stem": 24,
    "stages": [
        ["fused", 1, 3, 1, 24, 1],
        ["fused", 4, 3, 2, 32, 2],
        ["fused", 4, 3, 2, 48, 2],
        ["mbconv", 4, 3, 2, 96, 3],
        ["mbconv", 4, 3, 1, 112, 2],
        ["mbconv", 4, 3, 2, 160, 3],
    ],
    "c_last": 512,
}
TINY = {
    "c_latent": 4,
    "stem": 8,
    "stages": [
        ["fused", 2, 2, 8, 1],
        ["mbconv", 1, 5, 2, 12, 2],
        ["fused", 1, 2, 12, 1],
        ["mbconv", 3, 2, 16, 1],
    ],
    "c_last": 24,
}


def test_published_numbers():
    golden, _ = read_golden("effnet_encoder")
    with torch.device("meta"):
        model = SemanticCompressor.from_config({"c_latent": 16})
    with torch.no_grad():
        latent = fill_hashed(model)(golden["in.image"])
    assert relative_error(latent, golden["out.latent"]) <= 1e-5


def test_published_file_is_recognised_and_loads_strictly():
    shapes = manifest_shapes("effnet_encoder")
    config = infer_compressor(shapes)
    assert config == {"c_latent": 16}
    with torch.device("meta"):
        model = SemanticCompressor.from_config({"c_latent": 16})
    assert list(module_shapes(model).items()) == list(shapes.items())  # in the published order, too


def test_other_files_are_not_compressors():
    for checkpoint in ("stage_c_1b", "stage_a", "previewer", "controlnet_canny"):
        assert infer_compressor(manifest_shapes(checkpoint)) is None
    shapes = manifest_shapes("effnet_encoder")
    assert infer_compressor({**shapes, "mapper.0.weight": (16, 640, 1, 1)}) is None
    assert infer_compressor({**shapes, "backbone.0.0.weight": (24, 4, 3, 3)}) is None
    assert infer_compressor({**shapes, "backbone.2.0.block.0.0.weight": (97, 24, 3, 3)}) is None
    assert infer_compressor({k: v for k, v in shapes.items() if k != "backbone.7.0.weight"}) is None
    assert infer_compressor({}) is None


def test_another_size_runs_and_is_inferred():
    model = SemanticCompressor.from_config(SMALL).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_449_156
    with torch.no_grad():
        assert model(torch.rand(2, 3, 192, 192)).shape == (2, 16, 6, 6)
        assert model(torch.rand(1, 3, 33, 95)).shape == (1, 16, 2, 3)  # a part of 32 pixels counts as a whole
    assert infer_compressor(module_shapes(model)) == SMALL


def test_kernels_and_expansions_are_inferred():
    model = SemanticCompressor.from_config(TINY).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96)).shape == (1, 4, 2, 3)
    config = infer_compressor(module_shapes(model))
    assert config is not None
    assert config["stages"] == [
        ["fused", 2, 3, 2, 8, 1],
        ["mbconv", 1, 5, 2, 12, 2],
        ["fused", 1, 3, 2, 12, 1],
        ["mbconv", 3, 3, 2, 16, 1],
    ]
    assert module_shapes(SemanticCompressor.from_config(config)) == module_shapes(model)


def test_assumed_strides():
    assert published_strides(6) == (1, 2, 2, 2, 1, 2)
    assert published_strides(7) == (1, 2, 2, 2, 1, 2, 1)
    assert published_strides(5) == (1, 2, 2, 2, 2)
    assert published_strides(2) == (2, 2)


def test_normalisation():
    image = torch.tensor([0.485, 0.456 + 0.224, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(normalise(image).flatten(), torch.tensor([0.0, 1.0, -0.406 / 0.225]))


def test_training_updates_the_statistics_and_learns():
    torch.manual_seed(0)
    model = SemanticCompressor.from_config({**TINY, "drop_path": 0.2}).train()
    images = torch.rand(16, 3, 64, 64)
    latent = model(images)
    # the mapper's normalisation is over batch and positions, without scale or shift
    assert torch.allclose(latent.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(latent.var((0, 2, 3), unbiased=False), torch.ones(4), atol=1e-2)
    latent[:, 0].square().mul(torch.rand(16, 2, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            assert module.num_batches_tracked == 1
            assert module.running_mean is not None
            assert module.running_mean.abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), model(images))


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = stochastic_depth(torch.ones(4000, 2, 1, 3), 0.25).flatten(1)
    assert torch.equal(dropped.amin(1), dropped.amax(1))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(dropped.mean().item() - 1) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_follows_its_input(dtype):
    stored, x = BatchNorm2d(3, eps=1e-3).eval(), torch.randn(2, 3, 4, 4)
    assert stored.running_var is not None
    stored.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    stored.to(dtype)
    expected = (x - 0) / (torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + 1e-3).sqrt()
    assert torch.allclose(stored(x), expected, atol=1e-6)  # half-precision statistics, float32 input
    assert stored(x.to(dtype)).dtype == dtype
    assert stored.float()(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "config",
    [
        {"stages": [["fused", 1, 1, 24]]},
        {"stages": [["conv", 1, 3, 1, 24, 2]]},
        {"stages": [["mbconv", 4, 3, 0, 24, 2]]},
        {"stages": [["mbconv", 4.5, 3, 2, 24, 2]]},
    ],
)
def test_bad_tables_are_refused_by_stage(config):
    with pytest.raises(CascadeError, match=r"EfficientNet stage 1 is .* expected"):
        SemanticCompressor.from_config(config)


def test_unknown_argument_and_wrong_image_are_refused():
    with pytest.raises(CascadeError, match="c_laten"):
        SemanticCompressor.from_config({"c_laten": 16})
    with pytest.raises(CascadeError, match=r"shape \(1, 4, 64, 64\), expected \(B, 3, H, W\)"):
        SemanticCompressor.from_config(TINY)(torch.rand(1, 4, 64, 64))
