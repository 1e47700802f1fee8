"""A sampling run without ComfyUI: our guidance, our samplers, one prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....cascade_core.diffusion.guidance import Guider
from ....cascade_core.diffusion.samplers import SAMPLERS, SamplerStep, add_noise, masked_denoise
from ....cascade_core.diffusion.schedule import noise_cond
from ....cascade_core.engine import Engine
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks import activations
from ....cascade_core.networks.stage_b import StageB
from ....cascade_core.networks.tiles import predict_in_tiles
from ..reporting import check_interrupted, report
from ..run import Run, Sampled, Watch, mask_like
from .control import RunControls
from .device import on_device
from .vae import SCALE_FACTOR

# Latents on the sockets are in these units times what the network diffuses.
SOCKET_UNITS = {"stage_c": 1.0, "stage_b": SCALE_FACTOR}


@torch.inference_mode()
def sample(run: Run) -> Sampled:
    guiders = Guiders(run)
    return on_device(
        run.model.network,
        lambda device: _sampled(run, guiders, device),
        _working(run),
        run.model.patches,
        consumer=run.model.engine,
    )


def _sampled(run: Run, guiders: "Guiders", device: torch.device) -> Sampled:
    """From the noise on: run anew in a smaller placement, it gives the same."""
    units = SOCKET_UNITS[run.kind]
    watch = Watch(device)
    latent = run.samples.to(device, torch.float32) / units
    source = run.noise()
    noise = source.draw().to(device)

    def denoise(x: Tensor, log_snr: Tensor) -> Tensor:
        check_interrupted()
        return guiders.at(log_snr)(x, noise_cond(log_snr))

    mask = None if run.noise_mask is None else mask_like(run.noise_mask, latent)
    predict = denoise if mask is None else masked_denoise(mask, latent, noise, denoise)
    start = add_noise(latent, noise, run.denoise, run.shift)
    sampled = SAMPLERS[run.sampler](predict, start, run.log_snrs(), source.draw, _progress)
    if mask is not None:
        sampled = torch.lerp(latent, sampled, mask)
    return watch.stop((sampled * units).float().cpu())


def _working(run: Run) -> int:
    """Bytes that a forward takes beside the weights."""
    network, batch = run.model.network, len(run.samples) * (1 if run.cfg == 1 else 2)
    height, width = run.samples.shape[-2:]
    tokens = network.config.c_clip_seq  # of an image's conditioning
    if run.kind == "stage_c":
        text, values = _only(run.positive, "positive")
        images = max(len(values.get("unclip_conditioning") or []), 1)
        tokens = text.shape[1] + tokens * (1 + images)
        values = activations.stage_c(network.config, batch, height, width, tokens)
    else:
        side = run.tile or max(height, width)
        values = activations.stage_b(network.config, batch, min(height, side), min(width, side))
    working = values * next(network.parameters()).dtype.itemsize
    # A CUDA graph is recorded when the runs before it are over, and counted from then on (engine/graphs.py).
    return working + run.model.engine.extra_bytes(batch * tokens) if run.engine else working


class Guiders:
    """The Guider of each step of a run: another one where other ControlNets are on."""

    def __init__(self, run: Run):
        conditions = CONDITIONS[run.kind]
        config = run.model.network.config
        self.run = run
        self.positive = conditions(_only(run.positive, "positive"), config)
        self.negative = conditions(_only(run.negative, "negative"), config)
        prompts = [run.positive] if run.cfg == 1 else [run.positive, run.negative]
        self.controls = RunControls(run, prompts) if run.kind == "stage_c" else None
        self.on: frozenset | None = None
        self.guider: Guider | None = None

    def at(self, log_snr: Tensor) -> Guider:
        """For a level of noise, the same for each image (B,)."""
        on = self.controls.on_at(log_snr[0]) if self.controls and self.controls.residuals else frozenset()
        if self.guider is None or on != self.on:
            self.on, self.guider = on, self._make(on)
        return self.guider

    def _make(self, on: frozenset) -> Guider:
        positive, negative = self.positive, self.negative
        if self.controls is not None:
            positive = {**positive, "control": self.controls.merged(self.run.positive, on)}
            negative = {**negative, "control": self.controls.merged(self.run.negative, on)}
        model = self.run.model.engine if self.run.engine else self.run.model.network
        dtype = next(model.parameters()).dtype
        if self.run.tile:
            model = in_tiles(model, self.run.tile)
        return Guider(model, positive, negative, self.run.cfg, self.run.cfg_rescale, dtype)


def in_tiles(network: StageB | Engine, tile: int) -> Callable[..., Tensor]:
    """Stage B predicting in tiles of so many positions a side; can be stopped between them."""

    def whole(x: Tensor, r: Tensor, effnet: Tensor, **conditions: Any) -> Tensor:
        def predict(part: Tensor, seen: Tensor) -> Tensor:
            check_interrupted()
            return network(part, r, effnet=seen, **conditions)

        return predict_in_tiles(predict, x, effnet, tile, network.config.patch_size)

    return whole


def with_guidance(model: Any, cfg_rescale: float, shift: float) -> Any:
    raise CascadeError(
        "Cascade Guidance is for ComfyUI's own samplers, which are not here; connect the MODEL to Cascade Prior "
        "Sampler or Cascade Decoder Sampler, which have cfg_rescale and shift themselves."
    )


def _progress(step: SamplerStep) -> None:
    report(step.index + 1, step.steps)


def _only(conditioning: list, socket: str) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1:
        raise CascadeError(
            f"{socket} holds {len(conditioning)} prompts, but exactly one can be sampled outside ComfyUI; "
            "connect one Cascade Text Encode."
        )
    tokens, values = conditioning[0]
    return tokens, values


def _stage_c_conditions(prompt: tuple[Tensor, dict[str, Any]], config) -> dict[str, Tensor]:
    tokens, values = prompt
    return {
        "clip_text": tokens,
        "clip_text_pooled": values["pooled_output"][:, None],
        "clip_img": image_tokens(values, config.c_clip_img),
    }


def _stage_b_conditions(prompt: tuple[Tensor, dict[str, Any]], config) -> dict[str, Tensor]:
    _, values = prompt
    return {"clip": values["pooled_output"][:, None], "effnet": values["stable_cascade_prior"]}


CONDITIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "stage_c": _stage_c_conditions,
    "stage_b": _stage_b_conditions,
}


def image_tokens(values: dict[str, Any], width: int) -> Tensor:
    """Image embeddings, each times its strength, side by side: (1, images, width); zeros without any."""
    prompts = values.get("unclip_conditioning") or []
    if not prompts:
        return torch.zeros(1, 1, width)
    embeds = [prompt["clip_vision_output"].image_embeds[None] * prompt["strength"] for prompt in prompts]
    return torch.cat(embeds, dim=1)
