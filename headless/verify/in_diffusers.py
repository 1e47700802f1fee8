"""The same weights in diffusers' networks and pipelines, to compare results. Nothing is downloaded.

diffusers 0.35.2 is the last version that supports Stable Cascade; later ones still have it.
"""

from __future__ import annotations

import gc
import importlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...cascade_core.checkpoints import DIFFUSERS, layout_named, load_model, locate, read_json
from ...cascade_core.diffusion.noise import NoiseSource
from ...cascade_core.diffusion.samplers import log_snr_range
from ...cascade_core.diffusion.schedule import noise_cond
from ...cascade_core.geometry import LATENT_CHANNELS, stage_b_size, stage_c_size
from ...cascade_core.networks.config import StageAConfig, StageBConfig, StageCConfig, UNetConfig
from ...cascade_core.text.vocabulary import save_vocabulary
from .networks import Outputs, computing_in_float32
from .picture import MadePicture, PictureRun

BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
SAME = (
    "Weights, text states, first noise and the noise of every step are the same, and diffusers' scheduler is given "
    "our times: by itself it tells the network t = 1 in the first step and adds no noise in the last."
)
NOT_THE_SAME = (
    "diffusers has no rescale of guidance, which is off in both. In 16 bits it rounds the time, and the latent after "
    "every step, and on CUDA our engine adds in another order."
)


def load_diffusers() -> Any | None:
    """diffusers, or None where it is not installed.  Lets other exceptions of its import through."""
    try:
        with _quiet():
            library = importlib.import_module("diffusers")
            importlib.import_module("diffusers.utils.logging").set_verbosity_error()
            paella()  # imports the pipelines, which need more than the library itself
            return library
    except ModuleNotFoundError as error:
        if error.name == "diffusers":
            return None
        raise


@torch.no_grad()
def outputs_in_diffusers(
    library: Any, part: str, network: Any, inputs: Mapping[str, Any], path: Path
) -> Outputs | None:
    """diffusers' outputs for the fixed inputs of a network; None for a network that it does not have.

    network  ours, of `networks.load_network`, whose weights are shared
    """
    if part not in _OUTPUTS:
        return None
    with _quiet():
        return _OUTPUTS[part](library, network, inputs, path)


def _stage_c(library: Any, network: Any, inputs: Mapping[str, Any], path: Path) -> Outputs:
    theirs = shared_unet(library, "stage_c", network, path)
    conditions = {name: inputs[name] for name in ("clip_text", "clip_text_pooled", "clip_img")}
    with computing_in_float32(theirs):
        return {"epsilon": theirs(inputs["x"], inputs["r"], **conditions).sample}


def _stage_b(library: Any, network: Any, inputs: Mapping[str, Any], path: Path) -> Outputs:
    theirs = shared_unet(library, "stage_b", network, path)
    conditions = {"clip_text_pooled": inputs["clip"], "effnet": inputs["effnet"]}
    with computing_in_float32(theirs):
        return {"epsilon": theirs(inputs["x"], inputs["r"], **conditions).sample}


def _stage_a(library: Any, network: Any, inputs: Mapping[str, Any], path: Path) -> Outputs:
    theirs, scale = shared_vqgan(network), network.config.scale_factor
    with computing_in_float32(theirs):  # as tuples, since 0.35.2 fails to build its encoder's named output
        (picture,) = theirs.decode(inputs["latent"] * scale, return_dict=False)
        (latent,) = theirs.encode(inputs["image"], return_dict=False)
    return {"picture": picture, "latent": latent / scale}


def _text(library: Any, network: Any, inputs: Mapping[str, Any], path: Path) -> Outputs:
    """Text encoded by the prior pipeline, with transformers' own tokenizer on the same vocabulary."""
    merges = json.loads(network.tokenizer.backend.to_str())["model"]["merges"]
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = network.tokenizer.backend.get_vocab()
        save_vocabulary(folder, vocabulary, [(left, right) for left, right in merges])
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    pipeline = library.StableCascadePriorPipeline(
        tokenizer, network.model, prior=None, scheduler=library.DDPMWuerstchenScheduler()
    )
    states, pooled, *_ = pipeline.encode_prompt(
        device="cpu",
        batch_size=1,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        prompt=inputs["prompt"],
    )
    return {"states": states, "pooled": pooled[:, 0]}


def _vision(library: Any, network: Any, inputs: Mapping[str, Any], path: Path) -> Outputs:
    transformers, side = importlib.import_module("transformers"), network.image_size
    prepare = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    picture = (255 * inputs["image"][0]).to(torch.uint8).numpy()
    pixels = prepare(picture, return_tensors="pt").pixel_values
    return {"embeds": network.model(pixels).image_embeds}


_OUTPUTS = {"stage_c": _stage_c, "stage_b": _stage_b, "stage_a": _stage_a, "text": _text, "vision": _vision}


# Networks


def shared_unet(library: Any, kind: str, network: Any, path: Path | None = None) -> Any:
    """diffusers' network of Stage C or B on the same weights, by its own config.json where that lies beside them."""
    config = locate(path, kind).with_name("config.json") if path is not None else None
    stated = read_json(config) if config is not None and config.is_file() else {}
    with torch.device("meta"):
        if stated.get("_class_name") == "StableCascadeUNet":
            theirs = library.StableCascadeUNet.from_config(stated)
        else:
            theirs = library.StableCascadeUNet(**_ARGUMENTS[kind](network.config))
    return _shared(kind, network, theirs)


def shared_vqgan(network: Any) -> Any:
    """diffusers' Stage A on the same weights."""
    config = cast(StageAConfig, network.config)
    with torch.device("meta"):
        theirs = paella()(
            levels=config.levels,
            bottleneck_blocks=config.bottleneck_blocks,
            embed_dim=config.c_hidden,
            latent_channels=config.c_latent,
            num_vq_embeddings=config.codebook_size,
            scale_factor=config.scale_factor,
        )
    return _shared("stage_a", network, theirs)


def paella() -> Any:
    """diffusers' Stage A class, taken from the pipeline's module because its own module differs between versions."""
    return importlib.import_module("diffusers.pipelines.stable_cascade.pipeline_stable_cascade").PaellaVQModel


def _shared(kind: str, network: Any, theirs: Any) -> Any:
    """Assigns the same tensors under diffusers' names."""
    layout = layout_named(kind, DIFFUSERS)
    theirs.load_state_dict(layout.from_published(network.state_dict()), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


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


_ARGUMENTS: dict[str, Any] = {"stage_c": _of_stage_c, "stage_b": _of_stage_b}


# Pipelines


@torch.no_grad()
def picture_in_diffusers(
    library: Any, run: PictureRun, files: Mapping[str, Path], made: MadePicture, progress: Any
) -> tuple[Tensor, Tensor]:
    """(Stage C's latent, pixels (1, H, W, 3)) of diffusers' two pipelines, one after the other, for the same run.

    made: our picture, whose text states, precision and device are taken
    """
    device, dtype = torch.device(made.device), getattr(torch, made.dtype)
    positive, negative = made.prompts
    texts = {
        "prompt_embeds": positive.states,
        "prompt_embeds_pooled": positive.pooled[:, None],
        "negative_prompt_embeds": negative.states,
        "negative_prompt_embeds_pooled": negative.pooled[:, None],
    }
    texts = {name: text.to(device, dtype) for name, text in texts.items()}
    width, height = run.size
    with _quiet():
        network = _loaded(library, "stage_c", files, dtype)
        prior = library.StableCascadePriorPipeline(
            tokenizer=None,
            text_encoder=tiny_text_encoder(dtype),
            prior=network,
            scheduler=_scheduler(library, run.prior.shift),
        ).to(device)
        latent = prior(
            **texts,
            **_noise(run, "stage_c", stage_c_size(height, width), dtype),
            **_watched(prior, run.prior.steps, progress),
            height=height,
            width=width,
            guidance_scale=run.prior.cfg,
            output_type="pt",
        ).image_embeddings
        del prior, network
        gc.collect()  # a pipeline is a reference cycle, and Stage C would stay in memory beside Stage B
        network = _loaded(library, "stage_b", files, dtype)
        vqgan, _, _ = load_model(files["stage_a"], expect="stage_a", dtype=dtype)
        positions = stage_b_size(height, width)
        decoder = library.StableCascadeDecoderPipeline(
            decoder=network,
            tokenizer=None,
            text_encoder=tiny_text_encoder(dtype),
            scheduler=_scheduler(library, run.decoder.shift),
            vqgan=shared_vqgan(vqgan),
            # Ratio of Stage B's positions to Stage C's; diffusers rounds the product down.
            latent_dim_scale=positions[0] / latent.shape[-2] + 1e-3,
        ).to(device)
        pixels = decoder(
            image_embeddings=made.latent.to(device, dtype),
            **texts,
            **_noise(run, "stage_b", positions, dtype),
            **_watched(decoder, run.decoder.steps, progress),
            guidance_scale=run.decoder.cfg,
            output_type="pt",
        ).images
    return latent.float().cpu(), pixels.float().cpu().movedim(1, -1)


def _loaded(library: Any, kind: str, files: Mapping[str, Path], dtype: torch.dtype) -> Any:
    network, _, _ = load_model(files[kind], expect=kind, dtype=dtype)
    return shared_unet(library, kind, network, files[kind])


def tiny_text_encoder(dtype: torch.dtype) -> Any:
    """A text encoder that is never called; the pipelines only read its dtype."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return CLIPTextModelWithProjection(config).to(dtype)


def _noise(run: PictureRun, kind: str, positions: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Our first noise, and a generator that continues with our later noise."""
    shape = (LATENT_CHANNELS[kind], *positions)
    generator = torch.Generator("cpu").manual_seed(run.seed)
    torch.randn(shape, generator=generator)
    return {"latents": NoiseSource(run.seed, 1, shape).draw().to(dtype), "generator": generator}


def _watched(pipeline: Any, steps: int, progress: Any) -> dict[str, Any]:
    pipeline.set_progress_bar_config(disable=True)

    def step(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        progress.node_step(index + 1, steps, None)
        return values

    return {"num_inference_steps": steps, "callback_on_step_end": step}


def _scheduler(library: Any, shift: float) -> Any:
    """diffusers' own scheduler at our times, which steps in float32, so that it draws our noise in 16 bits too."""

    class Scheduler(library.DDPMWuerstchenScheduler):
        def set_timesteps(self, num_inference_steps: int, timesteps: Any = None, device: Any = None) -> None:
            self.timesteps = noise_cond(log_snr_range(num_inference_steps, shift)).to(device)

        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> Any:
            exact = self.timesteps[(self.timesteps - timestep[0]).abs().argmin()].expand(len(sample))
            result = super().step(model_output.float(), exact, sample.float(), generator)
            result.prev_sample = result.prev_sample.to(sample.dtype)
            return result

    return Scheduler()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences diffusers' warnings that Stable Cascade is deprecated there, which readers of a report know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
