"""Sampler nodes of Stage C and Stage B."""

from typing import Any

import torch
from torch import Tensor

from ..cascade_core import limits
from ..cascade_core.diffusion.samplers import SAMPLERS
from ..cascade_core.errors import CascadeError
from ..cascade_core.geometry import STAGE_C_COMPRESSION
from ..cascade_core.run import SamplingRun, check_sampler
from ..cascade_core.stages.diffusion import stage_b_tile
from .api import io, searched_as
from .hosts import host
from .hosts.notices import shown
from .hosts.run import SamplingRequest
from .sockets import (
    check_conditioning,
    check_finite,
    check_latent,
    check_min_side,
    check_network,
    latent_shape,
    with_values,
    without_values,
)

CATEGORY = "Stable Cascade/sampling"
STAGE_C_CHANNELS = 16


def sampling_inputs(steps: int, cfg: float, shift: float) -> list[Any]:
    """Inputs that both samplers share, with a stage's own defaults."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            **limits.SEED.input(),
            control_after_generate=True,
            tooltip="Image i of a batch is drawn from seed + i, so that it does not depend on its batch.",
        ),
        io.Int.Input(
            "steps",
            default=steps,
            **limits.STEPS.input(),
            tooltip="Steps of sampling: more are finer and slower.",
        ),
        io.Float.Input(
            "cfg",
            default=cfg,
            **limits.CFG.input(),
            step=0.1,
            tooltip=(
                "Guidance: how strongly the prompt pulls. 1 runs without the negative prompt, in half the "
                "time."
            ),
        ),
        io.Float.Input(
            "cfg_rescale",
            default=0.7,
            **limits.CFG_RESCALE.input(),
            step=0.05,
            tooltip=(
                "Brings the contrast that guidance raises back to the prompt's own: 0 not at all, 1 fully."
            ),
        ),
        io.Float.Input(
            "shift",
            default=shift,
            **limits.SHIFT.input(),
            step=0.05,
            tooltip="Above 1 spends more of the steps on high noise, where the composition forms.",
        ),
        io.Combo.Input(
            "sampler",
            options=list(SAMPLERS),
            default="ddpm",
            tooltip="ddpm is the published one; ddim and dpmpp_2m add no noise; lcm is for few steps.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            **limits.DENOISE.input(),
            step=0.01,
            tooltip="1 starts from noise alone; less keeps more of the given latent; 0 returns it.",
        ),
    ]


def engine_input() -> Any:
    return io.Boolean.Input(
        "engine",
        default=True,
        optional=True,
        tooltip=(
            "Samples with fused kernels and CUDA graphs where they can be used: the same picture but for rounding, "
            "several times as fast. Off: plain PyTorch."
        ),
    )


class CascadePriorSampler(io.ComfyNode):
    """Samples Stage C: from a prompt to the semantic latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadePriorSampler",
            display_name="Cascade Prior Sampler",
            category=CATEGORY,
            description="Samples Stage C: what the picture shows.",
            **searched_as("stable cascade, wuerstchen, ksampler, text to image, txt2img, img2img"),
            inputs=[
                io.Model.Input("model", tooltip="Stage C."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent", tooltip="The Stage C latent to start from, empty or a picture's."),
                *sampling_inputs(steps=20, cfg=4.0, shift=2.0),
                engine_input(),
            ],
            outputs=[io.Latent.Output(display_name="stage_c", tooltip="The sampled Stage C latent.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, **settings) -> io.NodeOutput:
        network = check_network(model, "stage_c", "Cascade Prior Sampler", "Load Stage C")
        check_latent(
            latent, network, "latent", "the stage_c output of Cascade Empty Latent or Cascade Encode"
        )
        for socket, prompt in (("positive", positive), ("negative", negative)):
            check_conditioning(prompt, network, socket)
        return run_sampler("stage_c", model, positive, negative, latent, **settings)


class CascadeDecoderSampler(io.ComfyNode):
    """Samples Stage B: from the semantic latent to the picture's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeDecoderSampler",
            display_name="Cascade Decoder Sampler",
            category=CATEGORY,
            description="Samples Stage B: unfolds Stage C's latent into all the detail of the picture.",
            **searched_as("stable cascade, wuerstchen, ksampler, text to image, txt2img, img2img"),
            inputs=[
                io.Model.Input("model", tooltip="Stage B."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input(
                    "negative", tooltip="What it should not show; only used where cfg is not 1."
                ),
                io.Latent.Input("stage_c", tooltip="The latent that Stage C made, or a picture's."),
                io.Latent.Input("latent", tooltip="The Stage B latent to start from, empty or a picture's."),
                *sampling_inputs(steps=10, cfg=1.1, shift=1.0),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    **limits.TILE.input(),
                    step=64,
                    optional=True,
                    tooltip=(
                        "Side in pixels of tiles that are sampled together and blended, for large pictures on little "
                        "memory; best the size that Stage B was trained at (1024). 0 samples the whole."
                    ),
                ),
                engine_input(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="stage_b", tooltip="The sampled Stage B latent, for Cascade Decode."
                )
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, stage_c, latent, *, tile_size=0, **settings) -> io.NodeOutput:
        network = check_network(model, "stage_b", "Cascade Decoder Sampler", "Load Stage B")
        check_latent(
            latent, network, "latent", "the stage_b output of Cascade Empty Latent or Cascade Encode"
        )
        check_min_side(latent, network)
        semantic = semantic_latent(stage_c, len(latent["samples"]))
        for socket, prompt in (("positive", positive), ("negative", negative)):
            check_conditioning(prompt, network, socket)
        # ControlNets drive Stage C only, but the prompts of Cascade Prior Sampler may be connected here with theirs.
        positive, negative = (without_values(prompt, "control") for prompt in (positive, negative))
        positive = with_values(positive, stable_cascade_prior=semantic)
        negative = with_values(negative, stable_cascade_prior=torch.zeros_like(semantic))
        positions = stage_b_tile(tile_size)
        return run_sampler("stage_b", model, positive, negative, latent, tile_positions=positions, **settings)


def semantic_latent(stage_c: dict, batch: int) -> Tensor:
    """Stage C's latent (1 or B, 16, h, w) for a batch of B pictures."""
    shape = latent_shape(stage_c, "stage_c of Cascade Decoder Sampler")
    samples = stage_c["samples"]
    if len(shape) != 4 or shape[1] != STAGE_C_CHANNELS or 0 in shape:
        raise CascadeError(
            f"stage_c of Cascade Decoder Sampler has the shape {shape}, but Stage C's "
            "latent has 16 "
            "channels; connect Cascade Prior Sampler."
        )
    if len(samples) not in (1, batch):
        raise CascadeError(
            f"stage_c of Cascade Decoder Sampler holds {len(samples)} latents, but latent holds {batch}; "
            "give both the same batch size."
        )
    return samples


def run_sampler(
    kind: str,
    model: Any,
    positive: list,
    negative: list,
    latent: dict,
    *,
    seed: int,
    steps: int,
    cfg: float,
    cfg_rescale: float,
    shift: float,
    sampler: str,
    denoise: float,
    tile_positions: int = 0,
    engine: bool = True,
) -> io.NodeOutput:
    """A new LATENT with the sampled latent and all other entries of the given one; shows the run's time and memory."""
    check_sampler(sampler)
    if not 0 <= denoise <= 1:
        raise CascadeError(f"denoise is {denoise}; it must lie within 0 and 1.")
    if denoise == 0:
        return io.NodeOutput(dict(latent))
    run = SamplingRun(
        latent["samples"],
        seed,
        steps,
        shift,
        sampler,
        denoise,
        latent.get("noise_mask"),
        latent.get("batch_index"),
    )
    compression = latent.get("compression", STAGE_C_COMPRESSION)
    request = SamplingRequest(
        kind, model, positive, negative, run, cfg, cfg_rescale, tile_positions, engine, compression
    )
    result = host().sample(request)
    what = f"The latent that {host().describe_network(model).name} sampled"
    advice = "lower cfg and the weights in the prompt, or choose dtype bf16 or fp32 in its loader"
    check_finite([result.latent], model, what, advice)
    took = {
        "steps": steps,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "device": result.device,
    }
    return io.NodeOutput(
        {**latent, "samples": result.latent}, ui={"cascade_run": [took], **shown(result.notices)}
    )
