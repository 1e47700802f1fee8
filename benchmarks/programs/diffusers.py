"""diffusers: its two pipelines around the same weights, from given text embeddings to pixels."""

import importlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.checkpoints import LAYOUTS
from cascade_nodes.cascade_core.networks.config import StageAConfig, StageBConfig, StageCConfig, UNetConfig
from networks import Setup, latent_shape, random_prompts
from picture import Sampling
from programs.ours import Ours

NAME = "diffusers"
BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


class Diffusers:
    """diffusers' pipelines around our weights. Raises ImportError where diffusers or a dependency is missing."""

    def __init__(self, setup: Setup, ours: Ours):
        self.library: Any = importlib.import_module("diffusers")
        self.setup, self.ours = setup, ours

    @cached_property
    def pipelines(self) -> tuple[Any, Any]:
        """Prior and decoder pipeline. They read only the dtype of their text encoder, so a tiny one is enough."""
        library = self.library
        encoder = _tiny_text_encoder(self.setup.dtype)
        prior = library.StableCascadePriorPipeline(
            tokenizer=None,
            text_encoder=encoder,
            prior=self._unet("stage_c", _of_stage_c(self._config("stage_c", StageCConfig))),
            scheduler=library.DDPMWuerstchenScheduler(),
        )
        decoder = library.StableCascadeDecoderPipeline(
            decoder=self._unet("stage_b", _of_stage_b(self._config("stage_b", StageBConfig))),
            tokenizer=None,
            text_encoder=encoder,
            scheduler=library.DDPMWuerstchenScheduler(),
            vqgan=self._vqgan(),
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

    def _config(self, kind: str, config_class: Any) -> Any:
        return config_class.from_dict(self.setup.configs[kind])

    def _unet(self, kind: str, arguments: dict[str, Any]) -> Any:
        with torch.device("meta"):
            network = self.library.StableCascadeUNet(**arguments)
        return self._share(kind, network)

    def _vqgan(self) -> Any:
        config: StageAConfig = self._config("stage_a", StageAConfig)
        with torch.device("meta"):
            network = _paella()(
                levels=config.levels,
                bottleneck_blocks=config.bottleneck_blocks,
                embed_dim=config.c_hidden,
                latent_channels=config.c_latent,
                num_vq_embeddings=config.codebook_size,
                scale_factor=config.scale_factor,
            )
        return self._share("stage_a", network)

    def _share(self, kind: str, network: Any) -> Any:
        """Assigns the same tensors under diffusers' names."""
        layout = next(layout for layout in LAYOUTS[kind] if layout.name == "diffusers")
        weights = layout.from_published(self.ours.network(kind).state_dict())
        network.load_state_dict(weights, strict=True, assign=True)
        return network.eval().requires_grad_(False)


def _unet_arguments(config: UNetConfig) -> dict[str, Any]:
    """Constructor arguments, in diffusers' names, that both networks share."""
    (down, up), (repeat_down, repeat_up) = config.blocks, config.block_repeat
    return {
        "in_channels": config.c_in,
        "out_channels": config.c_out,
        "timestep_ratio_embedding_dim": config.c_r,
        "patch_size": config.patch_size,
        "conditioning_dim": config.c_cond,
        "block_out_channels": config.c_hidden,
        "num_attention_heads": config.nhead,
        "down_num_layers_per_block": down,
        "up_num_layers_per_block": up,
        "down_blocks_repeat_mappers": repeat_down,
        "up_blocks_repeat_mappers": repeat_up,
        "block_types_per_layer": [[BLOCKS[kind] for kind in kinds] for kinds in config.level_config],
        "clip_seq": config.c_clip_seq,
        "kernel_size": config.kernel_size,
        "dropout": config.dropout,
        "self_attn": config.self_attn,
        "timestep_conditioning_type": config.t_conds,
    }


def _of_stage_c(config: StageCConfig) -> dict[str, Any]:
    return {
        **_unet_arguments(config),
        "clip_text_in_channels": config.c_clip_text,
        "clip_text_pooled_in_channels": config.c_clip_text_pooled,
        "clip_image_in_channels": config.c_clip_img,
        "switch_level": config.switch_level,
    }


def _of_stage_b(config: StageBConfig) -> dict[str, Any]:
    return {
        **_unet_arguments(config),
        "clip_text_pooled_in_channels": config.c_clip,
        "effnet_in_channels": config.c_effnet,
        "pixel_mapper_in_channels": config.c_pixels,
    }


def _paella() -> Any:
    """diffusers' Stage A class, taken from the pipeline's module because its own module differs between versions."""
    module = importlib.import_module("diffusers.pipelines.stable_cascade.pipeline_stable_cascade")
    return module.PaellaVQModel


def _tiny_text_encoder(dtype: torch.dtype) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return CLIPTextModelWithProjection(config).to(dtype)
