"""diffusers: its two pipelines around the same weights, from given text embeddings to pixels."""

import importlib
from functools import cached_property
from typing import Any

from torch import Tensor

from cascade_nodes.headless.verify.in_diffusers import shared_unet, shared_vqgan, tiny_text_encoder
from networks import Setup, latent_shape, random_prompts
from picture import Sampling
from programs.ours import Ours

NAME = "diffusers"


class Diffusers:
    """diffusers' pipelines around our weights. Raises ImportError where diffusers or a dependency is missing."""

    def __init__(self, setup: Setup, ours: Ours):
        self.library: Any = importlib.import_module("diffusers")
        self.setup, self.ours = setup, ours

    @cached_property
    def pipelines(self) -> tuple[Any, Any]:
        """Prior and decoder pipeline around our weights."""
        library = self.library
        encoder = tiny_text_encoder(self.setup.dtype)
        prior = library.StableCascadePriorPipeline(
            tokenizer=None,
            text_encoder=encoder,
            prior=shared_unet(library, "stage_c", self.ours.network("stage_c")),
            scheduler=library.DDPMWuerstchenScheduler(),
        )
        decoder = library.StableCascadeDecoderPipeline(
            decoder=shared_unet(library, "stage_b", self.ours.network("stage_b")),
            tokenizer=None,
            text_encoder=encoder,
            scheduler=library.DDPMWuerstchenScheduler(),
            vqgan=shared_vqgan(self.ours.network("stage_a")),
            latent_dim_scale=self._scale(),
        )
        for pipeline in (prior, decoder):
            pipeline.set_progress_bar_config(disable=True)
        return prior.to(self.setup.device), decoder.to(self.setup.device)

    def sampling(self) -> Sampling:
        return Sampling(NAME, self.make)

    def make(self, batch: int) -> Tensor:
        """Pictures (B, 3, H, W) in main memory."""
        prior, decoder = self.pipelines
        positive, negative = random_prompts(self.setup)
        texts = {
            "prompt_embeds": positive.states,
            "prompt_embeds_pooled": positive.pooled[:, None],
            "negative_prompt_embeds": negative.states,
            "negative_prompt_embeds_pooled": negative.pooled[:, None],
        }
        side, (steps_c, steps_b), (cfg_c, cfg_b) = self.setup.side, self.setup.steps, self.setup.cfg
        latents = prior(
            **texts,
            height=side,
            width=side,
            num_inference_steps=steps_c,
            guidance_scale=cfg_c,
            num_images_per_prompt=batch,
            output_type="pt",
        ).image_embeddings
        rows = {name: text.expand(batch, *text.shape[1:]) for name, text in texts.items()}
        return decoder(
            image_embeddings=latents,
            **rows,
            num_inference_steps=steps_b,
            guidance_scale=cfg_b,
            output_type="pt",
        ).images.cpu()

    def _scale(self) -> float:
        """Stage B positions per Stage C position, slightly more because diffusers rounds their product down."""
        return (
            latent_shape("stage_b", self.setup.side)[1] / latent_shape("stage_c", self.setup.side)[1] + 1e-3
        )
