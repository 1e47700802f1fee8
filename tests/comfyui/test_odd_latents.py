"""Latents whose sides Stage B's patches do not divide, as ComfyUI's own nodes make them: sampled, and of that size."""

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.headless.record_comfyui import node

ENCODED = {
    "101": node("LoadImage", image="odd.png"),
    "102": node("VAEEncode", pixels=["101", 0], vae=["3", 0]),
    "8.latent": ["102", 0],
    "8.denoise": 0.4,
}
SAMPLED = {
    "103": node("StableCascade_StageB_Conditioning", conditioning=["5", 0], stage_c=["7", 0]),
    "8": node(
        "KSampler", model=["2", 0], positive=["103", 0], negative=["5", 1], latent_image=["102", 0], seed=1,
        steps=2, cfg=1.1, sampler_name="euler", scheduler="simple", denoise=0.4,
    ),
}  # fmt: skip
# {what makes the latent: (changes of the graph, the picture's width and height)}
CASES = {
    "VAEEncode": (ENCODED, (300, 200)),
    "LatentUpscaleBy": (
        {
            "102": node("LatentUpscaleBy", samples=["6", 1], upscale_method="bilinear", scale_by=1.3),
            "8.latent": ["102", 0],
        },
        (84, 84),
    ),
    "VAEEncode, by KSampler": (
        {key: value for key, value in ENCODED.items() if not key.startswith("8.")} | SAMPLED, (300, 200),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_odd_latent_is_sampled(client, server, name):
    changes, (width, height) = CASES[name]
    colours = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(colours).resize((300, 200)).save(server.base / "input" / "odd.png")
    execution = client.run(tiny({"7.seed": 120, **changes}))
    assert execution.error is None
    (picture,) = client.pictures(execution)
    assert picture.shape == (height, width, 3)
    assert picture.std() > 1
