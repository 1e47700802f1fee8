"""The image encoder: preprocessing against Pillow's, batches, files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.text.clip import fill_clip
from cascade_nodes.cascade_core.vision import (
    CLIP_MEAN,
    CLIP_STD,
    ImageEncoder,
    build_vision_model,
    infer_vision_config,
    middle_square,
    preprocess_images,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "projection_dim": 48,
    "image_size": 32,
    "patch_size": 8,
}


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = build_vision_model(CONFIG, device="meta").state_dict()
    return {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in shapes.items()}


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def assert_close(value: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert value.shape == reference.shape
    assert (value - reference).abs().max() <= tolerance * reference.abs().max()


def pixels(preprocessed: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in CLIP's units -> (B, H, W, 3) in 0 … 255"""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return ((preprocessed * std + mean) * 255).movedim(1, -1)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(fill_clip(build_vision_model(CONFIG, device="meta"), random_weights()))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (100, 40), (20, 24)])
def test_preprocessing_resizes_as_pillow_does(height, width):
    """Pillow's bicubic is antialiased too. In floats, as in 8 bits it rounds between the two directions."""
    picture = random_images(height, width, 3)
    size = (32 * width // min(height, width), 32 * height // min(height, width))
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    channels = [
        Image.fromarray(channel.numpy()).resize(size, Image.Resampling.BICUBIC)
        for channel in picture.unbind(-1)
    ]
    whole = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels], dim=-1)
    theirs = (255 * whole[top : top + 32, left : left + 32]).clamp(0, 255).round()
    difference = (pixels(preprocess_images(picture.unsqueeze(0), 32))[0] - theirs).abs()
    assert difference.max() < 1.01  # where a value lay between two levels
    assert difference.mean() < 0.01


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (400, 300), (213, 320), (479, 640), (500, 333), (1024, 1000), (91, 700)]
)
def test_pictures_are_cut_as_transformers_cuts_them(height, width):
    """The long side is cut down, not rounded: of 400 × 300 298 pixels are left, of which the middle 224 count."""
    from transformers.models.clip.image_processing_pil_clip import (
        CLIPImageProcessorPil,  # brings Triton with it
    )

    picture = (255 * random_images(height // 10, width // 10, 3)).byte().numpy()
    picture = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    theirs = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    ours = preprocess_images(torch.from_numpy(np.array(picture)).unsqueeze(0) / 255, 224)
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    difference = (pixels(ours) - pixels(theirs)).abs()
    assert difference.max() < 2.01  # Pillow rounds to 8 bits between the two directions
    assert difference.mean() < 0.3


def test_the_size_of_the_middle_square():
    """Where rounding would differ from cutting down, by a picture that only the right size reproduces."""
    picture = random_images(1, 300, 400, 3)
    whole = F.interpolate(picture.movedim(-1, 1), (224, 298), mode="bicubic", antialias=True).movedim(1, -1)
    assert torch.equal(middle_square(picture, 224), whole[:, :, 37:261])


def test_a_picture_of_the_right_size_is_only_normalised():
    images = (random_images(2, 32, 32, 3) * 255).round() / 255
    expected = (images - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(preprocess_images(images, 32), expected.movedim(-1, 1), atol=1e-6)


def test_the_middle_is_cut_out():
    images = (random_images(1, 32, 71, 3) * 255).round() / 255
    assert torch.allclose(pixels(preprocess_images(images, 32)) / 255, images[:, :, 19:51], atol=1e-5)


def test_a_batch_is_its_single_runs(encoder):
    images = random_images(19, 40, 50, 3)  # more than one pass
    embeds = encoder.encode(images)
    assert embeds.shape == (19, 48)
    assert embeds.dtype == torch.float32
    for index in (0, 15, 16, 18):
        single = encoder.encode(images[index : index + 1])[0]
        assert_close(embeds[index], single)
    alpha = torch.cat([images[:1], torch.zeros(1, 40, 50, 1)], dim=-1)
    assert_close(encoder.encode(alpha), encoder.encode(images[:1]))


def test_the_embedding_is_transformers(encoder):
    images = random_images(2, 32, 32, 3)
    theirs = encoder.model(pixel_values=preprocess_images(images, 32)).image_embeds
    assert_close(encoder.encode(images), theirs)


def test_the_published_image_encoder_is_inferred():
    manifests = json.loads(gzip.decompress((GOLDEN / "checkpoint_manifests.json.gz").read_bytes()))
    shapes = {name: shape for name, (_, shape) in manifests["image_encoder_clip_vit_l14"].items()}
    config = infer_vision_config(shapes)
    assert config == {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = build_vision_model(config, device="meta")
    assert model.load_state_dict(weights, strict=True, assign=True)
    assert sum(p.numel() for p in model.parameters()) == 303_966_208


@pytest.mark.parametrize("metadata", [{}, {"kind": "image_encoder", "config": json.dumps(CONFIG)}])
def test_a_file_is_loaded(encoder, metadata, tmp_path):
    write_safetensors(tmp_path / "vision.safetensors", random_weights(), metadata)
    loaded = ImageEncoder.load(tmp_path / "vision.safetensors")
    assert loaded.image_size == 32
    images = random_images(1, 50, 40, 3)
    assert_close(loaded.encode(images), encoder.encode(images))
    assert ImageEncoder.load(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_bad_input(encoder, tmp_path):
    with pytest.raises(CascadeError, match=r"shape \(32, 32, 3\) were given; expected \(B, H, W, 3\)"):
        encoder.encode(torch.zeros(32, 32, 3))
    write_safetensors(tmp_path / "text.safetensors", {"text_model.x": torch.zeros(1)}, {})
    with pytest.raises(CascadeError, match="is a CLIP text encoder, but a CLIP image encoder is expected"):
        ImageEncoder.load(tmp_path / "text.safetensors")
    weights = random_weights()
    weights["visual_projection.weight"][0, 0] = torch.inf
    broken = ImageEncoder(fill_clip(build_vision_model(CONFIG, device="meta"), weights))
    with pytest.raises(
        CascadeError, match=r"image encoder's tensor visual_projection.weight holds NaN or infinity"
    ):
        broken.encode(random_images(1, 32, 32, 3))
