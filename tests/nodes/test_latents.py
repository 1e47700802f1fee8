"""Sizes, encoding and decoding."""

from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.pictures import resized
from cascade_nodes.nodes.hosts import host
from cascade_nodes.nodes.latents import (
    CascadeDecode,
    CascadeEmptyLatent,
    CascadeEncode,
    CascadeUpscaleLatent,
)
from cascade_nodes.nodes.loaders import CascadeCompressorLoader, StageAVAE


@pytest.mark.parametrize(
    ("width", "height", "stage_c", "stage_b"),
    [
        (1024, 1024, (24, 24), (256, 256)),
        (1536, 1024, (24, 36), (256, 384)),
        (256, 256, (6, 6), (64, 64)),
        (264, 8, (1, 7), (2, 66)),
    ],
)
def test_empty_latent_sizes(width, height, stage_c, stage_b):
    c, b = CascadeEmptyLatent.execute(width, height, 2, 42.67).args
    assert c["samples"].shape == (2, 16, *stage_c)
    assert b["samples"].shape == (2, 4, *stage_b)
    assert c["samples"].dtype == b["samples"].dtype == torch.float32
    assert not c["samples"].any()
    assert not b["samples"].any()


@pytest.mark.parametrize(("width", "height"), [(0, 256), (256, -8), (250, 256), (256, 16392)])
def test_sizes_that_no_picture_has(width, height):
    with pytest.raises(CascadeError) as error:
        CascadeEmptyLatent.execute(width, height, 1, 42.67)
    assert str(error.value).startswith(
        f"the size is {width} × {height}, but each side must be a multiple of 8 from 8 to 16384, such as "
    )
    assert CascadeEmptyLatent.validate_inputs(width, height) == str(error.value)


def test_sizes_that_are_known_later_are_not_refused():
    assert CascadeEmptyLatent.validate_inputs(256) is True
    assert CascadeEmptyLatent.validate_inputs(width=250) == (
        "the size is 250 × height, but each side must be a multiple of 8 from 8 to 16384, "
        "such as 248 × height."
    )


def test_what_is_no_number_is_left_to_the_host():
    """ComfyUI asks even where it has itself refused the value already."""
    assert CascadeEmptyLatent.validate_inputs("wide", [256]) is True
    assert "250 × height" in str(CascadeEmptyLatent.validate_inputs(250, "high"))


def test_no_pictures_at_all():
    with pytest.raises(CascadeError, match="batch_size is 0"):
        CascadeEmptyLatent.execute(256, 256, 0, 42.67)


def test_more_pixels_than_any_machine_should_try():
    """A few numbers may ask for gigabytes; they are refused before anything is allocated, in every node with a size."""
    message = "4,096 pictures of 1,024 × 1,024 pixels would be made, but no side may exceed 16,384 pixels"
    many = {"samples": torch.zeros(1, 16, 1, 1).expand(4096, -1, -1, -1)}
    with pytest.raises(CascadeError, match=message):
        CascadeEmptyLatent.execute(1024, 1024, 4096, 42.67)
    with pytest.raises(CascadeError, match=message):
        CascadeUpscaleLatent.execute(many, 1024, 1024, 42.67)
    assert CascadeEmptyLatent.execute(256, 256, 4096, 42.67)[0]["samples"].shape == (4096, 16, 6, 6)


@pytest.fixture
def compressor(tiny):
    return CascadeCompressorLoader.execute("tiny_compressor.safetensors", "tiny_previewer.safetensors")[0]


def test_a_picture_as_a_stage_c_latent(compressor):
    image = torch.rand(2, 70, 130, 3)
    stage_c, stage_b = CascadeEncode.execute(compressor, image, 32.0).args
    assert stage_c["samples"].shape == (2, 16, 3, 5)
    assert stage_b["samples"].shape == (2, 4, 16, 32)
    preview = CascadeDecode.execute(compressor, stage_c, 0)[0]
    assert preview.shape == (2, 24, 40, 3)


def test_a_picture_is_encoded_at_another_size(compressor, tiny):
    stage_a = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    image = torch.rand(1, 64, 96, 3)
    larger = resized(image, (128, 192))
    sides: dict[str, Any]
    for sides in ({"width": 192, "height": 128}, {"width": 192}, {"height": 128}):
        stage_c, stage_b = CascadeEncode.execute(
            compressor, image, 32.0, stage_a=stage_a, tile_size=64, **sides
        ).args
        assert stage_c["samples"].shape == (1, 16, 4, 6)
        assert torch.equal(stage_c["samples"], host().encode_pixels(compressor, larger))
        expected = host().encode_pixels(stage_a, larger)
        torch.testing.assert_close(stage_b["samples"], expected, rtol=0, atol=1e-5)
    assert CascadeEncode.execute(compressor, image, 32.0)[0]["samples"].shape == (1, 16, 2, 3)


def test_encoding_equals_the_network_on_the_resized_picture(compressor):
    image = torch.rand(1, 64, 96, 3)
    stage_c = CascadeEncode.execute(compressor, image, 32.0)[0]["samples"]
    with torch.no_grad():
        expected = compressor.encoder(image.movedim(-1, 1))
    torch.testing.assert_close(stage_c, expected, rtol=0, atol=1e-5)


def test_a_compressor_without_previewer_only_encodes(tiny):
    vae = CascadeCompressorLoader.execute("tiny_compressor.safetensors", "none")[0]
    with pytest.raises(CascadeError, match="only encodes"):
        CascadeDecode.execute(vae, {"samples": torch.zeros(1, 16, 2, 2)}, 0)


def test_stage_a_latents_are_in_the_codebooks_units(tiny):
    vae = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.encoder.decode(latent / 0.43).clamp(0, 1).movedim(1, -1)
    assert torch.equal(CascadeDecode.execute(vae, {"samples": latent}, 0)[0], expected)


def test_latents_of_the_other_stage_are_refused(tiny, compressor):
    vae = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    with pytest.raises(CascadeError, match="16 channels, but Stage A decodes the 4 channels"):
        CascadeDecode.execute(vae, {"samples": torch.zeros(1, 16, 2, 2)}, 0)
    with pytest.raises(CascadeError, match="4 channels, but the previewer decodes the 16 channels"):
        CascadeDecode.execute(compressor, {"samples": torch.zeros(1, 4, 2, 2)}, 0)
    with pytest.raises(
        CascadeError, match="Cascade Encode is Stage A, but the semantic compressor is expected"
    ):
        CascadeEncode.execute(vae, torch.rand(1, 64, 64, 3), 42.67)


@pytest.mark.parametrize("size", [64, 72, 100])
def test_a_picture_in_tiles_equals_the_whole(tiny, size):
    vae = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    latent = {"samples": torch.randn(2, 4, 61, 47)}
    whole, tiled = (CascadeDecode.execute(vae, latent, tile)[0] for tile in (0, size))
    assert tiled.shape == whole.shape == (2, 244, 188, 3)
    assert (whole - tiled).abs().max() <= 1e-5


def test_a_preview_in_tiles_equals_the_whole(compressor):
    latent = {"samples": torch.randn(1, 16, 23, 31)}
    whole, tiled = (CascadeDecode.execute(compressor, latent, tile)[0] for tile in (0, 64))
    assert (whole - tiled).abs().max() <= 1e-5


def test_a_picture_is_encoded_in_tiles_as_whole(tiny):
    vae = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    image = torch.rand(2, 244, 188, 3)
    whole, tiled = (host().encode_pixels(vae, image, tile) for tile in (0, 64))
    assert whole.shape == (2, 4, 61, 47)
    assert (whole - tiled).abs().max() <= 1e-5
