"""The nodes called from Python give what the front door gives, to the byte; the core knows nothing of the demo."""

from dataclasses import replace
from pathlib import Path

import torch

from cascade_nodes import StableCascade
from cascade_nodes.cascade_core.pictures import as_image
from cascade_nodes.headless.pictures import encode_png
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.latents import CascadeDecode, CascadeEmptyLatent
from cascade_nodes.nodes.loaders import CascadeTextEncoderLoader, StageAVAE, StageBLoader, StageCLoader
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler

ROOT = Path(__file__).parents[2]
PROMPT = "a large red star to the left of a small blue ring on a sand background"
STEPS = 2


@torch.inference_mode()
def test_the_nodes_called_from_python():
    cascade = StableCascade.demo()
    cascade.prior_settings = replace(cascade.prior_settings, steps=STEPS)
    cascade.decoder_settings = replace(cascade.decoder_settings, steps=STEPS)
    (stage_c,) = StageCLoader.execute("demo_stage_c.safetensors", "auto").args
    (stage_b,) = StageBLoader.execute("demo_stage_b.safetensors", "auto").args
    (stage_a,) = StageAVAE.execute("demo_stage_a.safetensors").args
    (clip,) = CascadeTextEncoderLoader.execute("demo_text_encoder").args
    positive, negative = CascadeTextEncode.execute(clip, PROMPT, "").args
    latent_c, latent_b = CascadeEmptyLatent.execute(256, 256, 1, 42.67).args
    shared = {"seed": 1, "steps": STEPS, "cfg_rescale": 0.0, "shift": 1.0, "denoise": 1.0}
    prior = {**shared, "cfg": 3.0, "sampler": "dpmpp_2m"}
    latent_c = CascadePriorSampler.execute(stage_c, positive, negative, latent_c, **prior).args[0]
    decoder = {**shared, "cfg": 1.4, "sampler": "ddpm"}
    latent_b = CascadeDecoderSampler.execute(stage_b, positive, negative, latent_c, latent_b, **decoder).args[
        0
    ]
    (image,) = CascadeDecode.execute(stage_a, latent_b, 0).args
    assert torch.equal(cascade(PROMPT, seed=1, output="tensor"), image)
    assert torch.equal(cascade.prior(PROMPT, seed=1), latent_c["samples"])
    (picture,) = cascade(PROMPT, seed=1)
    assert encode_png(image[0], {}) == encode_png(as_image(picture)[0], {})


def test_the_core_never_names_the_demo():
    core = ROOT / "cascade_core"
    assert not [path for path in core.rglob("*.py") if "demo_" in path.read_text(encoding="utf-8")]
