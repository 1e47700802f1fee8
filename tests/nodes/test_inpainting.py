"""Inpainting and outpainting: masks in Cascade Encode, and whole graphs of nothing but our nodes and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.hints.masks import latent_mask
from cascade_nodes.headless import run_graph
from cascade_nodes.nodes.inpainting import CascadeInpaintComposite, CascadeOutpaint
from cascade_nodes.nodes.latents import CascadeDecode, CascadeEncode
from cascade_nodes.nodes.loaders import CascadeCompressorLoader, StageAVAE
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes import controlnets, graph


@pytest.fixture
def compressor(tiny):
    return CascadeCompressorLoader.execute("tiny_compressor.safetensors", "none")[0]


@pytest.fixture
def stage_a(tiny):
    return StageAVAE.execute("tiny_stage_a.safetensors")[0]


def left_half(batch=1, height=64, width=128):
    mask = torch.zeros(batch, height, width)
    mask[:, :, : width // 2] = 1
    return mask


def test_a_mask_goes_with_the_latent_of_the_picture(compressor, stage_a):
    image, mask = torch.rand(2, 64, 128, 3), left_half()
    plain_c, plain_b = CascadeEncode.execute(compressor, image, 32.0).args
    stage_c, stage_b = CascadeEncode.execute(compressor, image, 32.0, mask, stage_a).args
    assert torch.equal(stage_c["samples"], plain_c["samples"])
    assert torch.equal(stage_c["noise_mask"], latent_mask(mask, 2, (2, 4)))
    assert torch.equal(stage_b["noise_mask"], latent_mask(mask, 2, (16, 32)))
    with torch.no_grad():
        expected = stage_a.encoder.encode(image.movedim(-1, 1)) * 0.43
    torch.testing.assert_close(stage_b["samples"], expected, rtol=0, atol=1e-5)
    grown_c, grown_b = CascadeEncode.execute(compressor, image, 32.0, mask, stage_a, grow=1).args
    assert grown_c["noise_mask"].sum() == 2 * 2 * 3  # of both pictures, in both rows, a third column
    assert torch.equal(grown_b["noise_mask"], stage_b["noise_mask"])
    with pytest.raises(CascadeError, match="grow is 17; it must lie within 0 and 16"):
        CascadeEncode.execute(compressor, image, 32.0, mask, stage_a, grow=17)
    assert "noise_mask" not in plain_c
    assert not plain_b["samples"].any()


def test_an_empty_stage_b_latent_has_nothing_to_keep(compressor, stage_a):
    image = torch.rand(1, 64, 128, 3)
    _, stage_b = CascadeEncode.execute(compressor, image, 32.0, left_half()).args
    assert "noise_mask" not in stage_b
    _, whole = CascadeEncode.execute(compressor, image, 32.0, None, stage_a).args
    assert "noise_mask" not in whole
    assert whole["samples"].any()
    with pytest.raises(CascadeError, match="stage_a is the semantic compressor, but Stage A is expected"):
        CascadeEncode.execute(compressor, image, 32.0, None, compressor)


def test_both_samplers_keep_what_is_outside_the_mask(tiny, compressor, stage_a):
    sockets = graph.load()
    encode = graph.CascadeTextEncode.execute(sockets["clip"], "a red star", "")
    positive, negative = encode.args
    image = torch.rand(1, 64, 128, 3)
    latents = CascadeEncode.execute(compressor, image, 32.0, left_half(), stage_a).args
    stage_c = CascadePriorSampler.execute(
        sockets["stage_c"], positive, negative, latents[0], seed=1, **graph.PRIOR
    )[0]
    stage_b = CascadeDecoderSampler.execute(
        sockets["stage_b"], positive, negative, stage_c, latents[1], seed=1, **graph.DECODER
    )[0]
    for sampled, latent in zip((stage_c, stage_b), latents, strict=True):
        half = latent["samples"].shape[-1] // 2
        assert torch.equal(sampled["samples"][..., half:], latent["samples"][..., half:])
        assert (
            not torch.isclose(sampled["samples"][..., :half], latent["samples"][..., :half]).any(dim=1).all()
        )


def test_room_is_added_to_every_picture_of_a_batch():
    image = torch.rand(2, 16, 24, 3)
    larger, mask = CascadeOutpaint.execute(image, 8, 0, 16, 8, 4).args
    assert larger.shape == (2, 24, 48, 3)
    assert mask.shape == (2, 24, 48)
    assert torch.equal(larger[:, :16, 8:32], image)
    with pytest.raises(CascadeError, match="would have 16392 × 16 pixels"):
        CascadeOutpaint.execute(image, 16368, 0, 0, 0, 0)


def test_a_painted_picture_of_another_size_goes_into_the_source():
    source, painted, mask = torch.rand(1, 63, 126, 3), torch.rand(2, 56, 120, 3), left_half(1, 63, 126)
    composited = CascadeInpaintComposite.execute(painted, source, mask, 8)[0]
    assert composited.shape == (2, 63, 126, 3)
    assert torch.equal(composited[:, :, 63:], source[:, :, 63:].expand(2, -1, -1, -1))
    with pytest.raises(CascadeError, match="feather is -1"):
        CascadeInpaintComposite.execute(painted, source, mask, -1)


INPAINT = {
    "1": node("StageCLoader", file="tiny_stage_c.safetensors", dtype="auto"),
    "2": node("StageBLoader", file="tiny_stage_b.safetensors", dtype="auto"),
    "3": node("StageAVAE", file="tiny_stage_a.safetensors"),
    "4": node("CascadeTextEncoderLoader", file="tiny_text_encoder"),
    "5": node("CascadeCompressorLoader", file="tiny_compressor.safetensors", previewer="none"),
    "6": node("CascadeControlNetLoader", file="set by the test"),
    "7": node("LoadImage", image="picture.png"),
    "8": node("CascadeTextEncode", clip=["4", 0], positive="a red star", negative=""),
    "9": node("CascadeInpaintHint", image=["7", 0], mask=["7", 1], threshold=0.5),
    "10": node("CascadeControlNetApply", positive=["8", 0], negative=["8", 1], control_net=["6", 0], image=["9", 0],
               strength=1.0, start=0.0, end=1.0),
    "11": node("CascadeEncode", vae=["5", 0], image=["7", 0], compression=32.0, mask=["7", 1], stage_a=["3", 0]),
    "12": node("CascadePriorSampler", model=["1", 0], positive=["10", 0], negative=["10", 1], latent=["11", 0], seed=1,
               **graph.PRIOR),
    "13": node("CascadeDecoderSampler", model=["2", 0], positive=["10", 0], negative=["10", 1], stage_c=["12", 0],
               latent=["11", 1], seed=1, **graph.DECODER),
    "14": node("CascadeDecode", vae=["3", 0], samples=["13", 0], tile_size=0),
    "15": node("CascadeInpaintComposite", image=["14", 0], source=["7", 0], mask=["7", 1], feather=4),
    "16": node("SaveImage", images=["15", 0], filename_prefix="out"),
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A picture whose left half is transparent, and one that is white there."""
    colours = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    alpha = np.full((64, 128, 1), 255, np.uint8)
    alpha[:, :64] = 0
    Image.fromarray(np.concatenate([colours, alpha], axis=-1)).save(tmp_path / "picture.png")
    Image.fromarray(255 - alpha[..., 0]).save(tmp_path / "mask.png")
    return tmp_path, colours


@pytest.mark.parametrize("source", ["alpha", "mask"])
def test_inpainting_as_a_graph(source, tiny, pictures):
    folder, colours = pictures
    net = controlnets.write_controlnet(tiny, "inpaint")
    changed = {**INPAINT, "6": node("CascadeControlNetLoader", file=net)}
    if source == "mask":
        changed["17"] = node("LoadImageMask", image="mask.png", channel="red")
        for place in ("9", "11", "15"):
            inputs = {**changed[place]["inputs"], "mask": ["17", 0]}
            changed[place] = node(changed[place]["class_type"], **inputs)
    (picture,) = run_graph(changed, input_folder=folder, output_folder=folder / "out").pictures
    pixels = np.asarray(Image.open(picture.path).convert("RGB"))
    assert np.array_equal(pixels[:, 64:], colours[:, 64:])
    assert (pixels[:, :60] != colours[:, :60]).mean() > 0.9


def test_outpainting_as_a_graph(tiny, pictures):
    folder, colours = pictures
    net = controlnets.write_controlnet(tiny, "inpaint")
    Image.fromarray(colours).save(folder / "picture.png")
    outpaint = node("CascadeOutpaint", image=["7", 0], left=0, top=32, right=64, bottom=0, feather=0)
    changed = {**INPAINT, "6": node("CascadeControlNetLoader", file=net), "17": outpaint}
    for place in ("9", "11", "15"):
        inputs = dict(changed[place]["inputs"])
        inputs |= {"source" if place == "15" else "image": ["17", 0], "mask": ["17", 1]}
        changed[place] = node(changed[place]["class_type"], **inputs)
    (picture,) = run_graph(changed, input_folder=folder, output_folder=folder / "out").pictures
    pixels = np.asarray(Image.open(picture.path).convert("RGB"))
    assert pixels.shape == (96, 192, 3)
    assert np.array_equal(pixels[32:, :128], colours)
    assert pixels[:, 160:].std() > 0


def test_decoded_pictures_are_sized_as_the_latent(compressor, stage_a):
    """Of a picture whose sides are not multiples of 8, the samplers see one a little smaller."""
    _, stage_b = CascadeEncode.execute(compressor, torch.rand(1, 63, 126, 3), 32.0, None, stage_a).args
    assert CascadeDecode.execute(stage_a, stage_b, 0)[0].shape == (1, 56, 120, 3)
