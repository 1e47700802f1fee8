"""The nodes that make hints, on the host without ComfyUI."""

import sys

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.hints.canny import canny_hint
from cascade_nodes.cascade_core.hints.control import fit_hint
from cascade_nodes.cascade_core.hints.filters import inpaint_hint
from cascade_nodes.cascade_core.networks.config import ControlNetConfig
from cascade_nodes.nodes import faces
from cascade_nodes.nodes.control import (
    CascadeCanny,
    CascadeIdentityHint,
    CascadeInpaintHint,
    CascadeSuperResolutionHint,
)
from cascade_nodes.nodes.loaders import CascadeCompressorLoader, StageAVAE

GREY = ControlNetConfig(c_in=1, proj_blocks=(0,))
MAP = ControlNetConfig(c_in=2, proj_blocks=(0,), bottleneck_mode="simple")


def test_edges_are_shown_in_grey_and_kept_by_the_network():
    image = torch.rand(2, 6, 5, 3).repeat_interleave(16, 1).repeat_interleave(16, 2)
    hint = CascadeCanny.execute(image, 50, 150, 64)[0]
    edges = canny_hint(image.movedim(-1, 1), 50, 150, 64)
    assert edges.max() > 0.5
    assert hint.shape == (2, 96, 80, 3)
    assert torch.equal(hint.movedim(-1, 1), edges.expand(-1, 3, -1, -1))
    fitted = fit_hint(hint.movedim(-1, 1), GREY, (3, 3))
    assert fitted.shape == (2, 1, 96, 96)
    assert torch.allclose(
        fitted[:, :, :, 40], torch.nn.functional.interpolate(edges, (96, 96), mode="bilinear")[..., 40]
    )


def test_transparent_pictures_and_thresholds_out_of_order():
    image = torch.rand(1, 64, 64, 4)
    assert torch.equal(
        CascadeCanny.execute(image, 100, 200, 224)[0], CascadeCanny.execute(image[..., :3], 100, 200, 224)[0]
    )
    with pytest.raises(CascadeError, match="0 <= low <= high"):
        CascadeCanny.execute(image, 200, 100, 224)


def test_the_inpainting_hint_has_four_channels():
    image, mask = torch.rand(2, 32, 48, 3), torch.rand(1, 32, 48)
    hint = CascadeInpaintHint.execute(image, mask, 0.7)[0]
    assert hint.shape == (2, 32, 48, 4)
    assert torch.equal(hint.movedim(-1, 1), inpaint_hint(image.movedim(-1, 1), mask, 0.7))


@pytest.fixture
def compressor(tiny):
    return CascadeCompressorLoader.execute("tiny_compressor.safetensors", "none")[0]


def test_the_small_picture_is_compressed_at_half_the_large_ones_latent(compressor):
    image = torch.rand(2, 96, 64, 3)
    hint, stage_c, stage_b = CascadeSuperResolutionHint.execute(compressor, image, 2.0, 32.0).args
    with torch.no_grad():
        latent = compressor.encoder(image.movedim(-1, 1))  # (2, 16, 3, 2)
    expected = latent.repeat_interleave(2, 2).repeat_interleave(2, 3).movedim(1, -1)
    torch.testing.assert_close(hint, expected, rtol=0, atol=1e-5)
    assert stage_c["samples"].shape == (2, 16, 6, 4)
    assert stage_b["samples"].shape == (2, 4, 48, 32)
    assert not stage_c["samples"].any()
    assert not stage_b["samples"].any()


@pytest.mark.parametrize(
    ("scale", "compression", "stage_c", "stage_b"),
    [(2.0, 42.67, (6, 6), (64, 64)), (1.0, 32.0, (4, 4), (32, 32)), (3.0, 42.67, (9, 9), (94, 94))],
)
def test_the_large_pictures_latents(scale, compression, stage_c, stage_b, compressor):
    image = torch.rand(1, 128, 128, 3) if scale != 3 else torch.rand(1, 126, 126, 3)
    hint, c, b = CascadeSuperResolutionHint.execute(compressor, image, scale, compression).args
    assert hint.shape == (1, *stage_c, 16)
    assert c["samples"].shape[-2:] == stage_c
    assert b["samples"].shape[-2:] == stage_b


def test_super_resolution_refuses_other_values(tiny, compressor):
    image = torch.rand(1, 64, 64, 3)
    stage_a = StageAVAE.execute("tiny_stage_a.safetensors")[0]
    with pytest.raises(CascadeError, match="Super Resolution Hint is Stage A, but the semantic compressor"):
        CascadeSuperResolutionHint.execute(stage_a, image, 2.0, 42.67)
    with pytest.raises(CascadeError, match=r"scale is 0\.5"):
        CascadeSuperResolutionHint.execute(compressor, image, 0.5, 42.67)


def test_without_insightface_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(CascadeError, match="python -m pip install insightface onnxruntime"):
        CascadeIdentityHint.execute(torch.rand(1, 64, 64, 3), "where it is", 4, 42.67)
    with pytest.raises(CascadeError, match="place is 'there'; choose one of where it is, everywhere"):
        CascadeIdentityHint.execute(torch.rand(1, 64, 64, 3), "there", 4, 42.67)


def test_its_networks_are_looked_up_like_any_model_then_where_insightface_keeps_them(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(faces, "OWN_FOLDER", tmp_path)
    with pytest.raises(CascadeError, match=r"No InsightFace file 'models/buffalo_l/det_10g\.onnx' was found"):
        faces.network_file(faces.DETECTOR)
    insightface_path = tmp_path / faces.DETECTOR
    insightface_path.parent.mkdir(parents=True)
    insightface_path.touch()
    assert faces.network_file(faces.DETECTOR) == insightface_path
    among_models = tiny / "insightface" / faces.DETECTOR
    among_models.parent.mkdir(parents=True)
    among_models.touch()
    try:
        assert faces.network_file(faces.DETECTOR) == among_models
    finally:
        among_models.unlink()


@pytest.mark.parametrize(
    ("size", "latent"),
    [((600, 1000), (15, 24)), ((96, 64), (9, 6)), ((680, 700), (16, 17))],
)
def test_a_hint_of_the_pictures_proportions_is_seen_whole(size, latent):
    """Latents are whole positions, so that their proportions are not quite the picture's."""
    columns = torch.linspace(0, 1, size[1]).expand(1, 1, *size)
    rows = torch.linspace(0, 1, size[0])[:, None].expand(1, 1, *size)
    for ramp, side in ((columns, -1), (rows, -2)):
        fitted = fit_hint(ramp, GREY, latent)
        assert fitted.shape == (1, 1, latent[0] * 32, latent[1] * 32)
        assert fitted.amin() < 0.01
        assert fitted.amax() > 0.99
        assert fitted.amax(side).sub(1).abs().max() < 0.01


def test_of_a_hint_of_other_proportions_the_middle_is_seen():
    wide = torch.arange(12.0).expand(1, 2, 4, 12)
    assert fit_hint(wide, MAP, (4, 4))[0, 0, 0].tolist() == [4, 5, 6, 7]
    assert fit_hint(wide.transpose(-1, -2), MAP, (2, 2))[0, 0, :, 0].tolist() == [5, 7]
    assert fit_hint(torch.arange(4.0).expand(1, 2, 4, 4), MAP, (8, 8))[0, 0, 0].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
