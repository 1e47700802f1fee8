"""Stage C and Stage B, loaded: sampling runs with guidance, ControlNets and tiles, by the engine where possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.apply import Patch
from ..checkpoints import KIND_NAMES, load_model
from ..diffusion.guidance import Guider
from ..diffusion.samplers import Callback
from ..diffusion.schedule import noise_cond
from ..engine import Engine
from ..errors import CascadeError, quoted
from ..geometry import STAGE_B_COMPRESSION
from ..networks import activations
from ..networks.fp16 import scale_residual_stream
from ..networks.precision import compute_dtype
from ..networks.quantisation import FORMATS
from ..networks.stage_b import StageB
from ..networks.tiles import ALIGNMENT, in_whole_patches, predict_in_tiles
from ..pictures import finite_values
from ..placement import RunBytes
from ..run import SamplingResult, SamplingRun, Stopwatch, sample
from .control import RunControls
from .device import ComputeDevice
from .prompt import Prompt

SCALE_FACTOR = 0.43  # latents in sockets are this times those that Stage B diffuses, in the codebook's units
LEAST_TILE = 128  # pixels
LATENT_UNITS = {"stage_c": 1.0, "stage_b": SCALE_FACTOR}


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt pulls.  cfg: 1 runs without the negative prompt; cfg_rescale: 0 off, 1 full"""

    cfg: float
    cfg_rescale: float = 0.7


@dataclass(frozen=True)
class DiffusionStage:
    """Stage C or Stage B in evaluation mode. Changes by LoRAs are kept beside the network, which others share."""

    kind: str  # stage_c or stage_b
    file: str
    network: Any  # StageC or StageB
    engine: Engine  # called in the network's place
    device: ComputeDevice
    patches: tuple[Patch, ...] = ()

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with its file and the file's contents in words."""
        return [(self.network, self.described)]

    @property
    def described(self) -> str:
        """The file and what it holds, in words."""
        return f"{self.file} ({KIND_NAMES[self.kind]})"

    @torch.inference_mode()
    def sample(
        self,
        run: SamplingRun,
        positive: Prompt,
        negative: Prompt,
        guidance: Guidance,
        tile_positions: int = 0,
        with_engine: bool = True,
        callback: Callback | None = None,
    ) -> SamplingResult:
        """A latent in the units of `run.latent`: Stage C's own, or the codebook's for Stage B.

        tile_positions  side of Stage B's tiles; 0: whole
        with_engine     whether the engine is called in the network's place
        callback        called after each step; also for the steps of a run that begins again in less memory

        Raises CascadeError for ControlNets that do not fit, Interrupted where the observer says so.
        """
        guiders = StepGuiders(self, run, positive, negative, guidance, tile_positions, with_engine)
        units = LATENT_UNITS[self.kind]

        def body(device: torch.device) -> SamplingResult:
            """Samples from the start; repeated in a smaller placement, it gives the same latent."""
            stopwatch = Stopwatch(device)
            latent = run.latent.to(device, torch.float32) / units

            def predict(x: Tensor, log_snr: Tensor) -> Tensor:
                self.device.observer.check_interrupted()
                return guiders.at(log_snr)(x, noise_cond(log_snr))

            sampled = sample(replace(run, latent=latent), predict, callback)
            return stopwatch.stop((sampled * units).float().cpu())

        workspace = self._workspace_bytes(run, positive, guidance, tile_positions, with_engine)
        known_bytes = self._known_bytes(run, guidance, tile_positions) if with_engine else None
        return self.device.run(
            self.network, body, workspace, self.patches, consumer=self.engine, known_bytes=known_bytes
        )

    def check_picture_size(self, width: int, height: int) -> None:
        """Raises CascadeError for a picture so small that nothing is left of it at Stage B's innermost level."""
        least = min_latent_side(self.kind, self.network.config) * STAGE_B_COMPRESSION
        if min(width, height) < least:
            raise CascadeError(
                f"The picture is {width} × {height} pixels, but {self.described} makes none with a side under "
                f"{least}; choose a larger width and height."
            )

    def _known_bytes(self, run: SamplingRun, guidance: Guidance, tile_positions: int) -> RunBytes | None:
        """What runs of this shape are known to take; None where there was none."""
        batch, channels, height, width = run.latent.shape
        batch *= 1 if guidance.cfg == 1 else 2
        side = tile_positions or max(height, width)
        return self.engine.known_bytes((batch, channels, min(height, side), min(width, side)))

    def _workspace_bytes(
        self, run: SamplingRun, positive: Prompt, guidance: Guidance, tile_positions: int, with_engine: bool
    ) -> int:
        """Bytes that a forward takes beside the weights."""
        config, batch = self.network.config, len(run.latent) * (1 if guidance.cfg == 1 else 2)
        height, width = run.latent.shape[-2:]
        tokens = config.c_clip_seq
        if self.kind == "stage_c":
            tokens = positive.states.shape[1] + tokens * (1 + max(len(positive.pictures), 1))
            values = activations.stage_c(config, batch, height, width, tokens)
        else:
            side = tile_positions or max(height, width)
            values = activations.stage_b(config, batch, min(height, side), min(width, side))
        workspace = values * compute_dtype(self.network).itemsize
        # A CUDA graph is captured after earlier runs have ended, and its memory counts from then on (engine/graphs.py).
        return workspace + self.engine.extra_bytes(batch * tokens) if with_engine else workspace


class StepGuiders:
    """The Guider of each step of a run, made anew when other ControlNets are on."""

    def __init__(
        self,
        stage: DiffusionStage,
        run: SamplingRun,
        positive: Prompt,
        negative: Prompt,
        guidance: Guidance,
        tile_positions: int,
        with_engine: bool,
    ):
        conditions = CONDITIONS[stage.kind]
        self.stage, self.guidance = stage, guidance
        self.tile_positions, self.with_engine = tile_positions, with_engine
        self.prompts = positive, negative
        self.conditions = [conditions(prompt, stage.network.config) for prompt in self.prompts]
        self.controls: RunControls | None = None
        if stage.kind == "stage_c":
            asked = self.prompts[:1] if guidance.cfg == 1 else self.prompts
            applied = [one for prompt in asked for one in prompt.controlnets]
            self.controls = RunControls(stage.network, run, applied, stage.device.observer)
        self.active: frozenset | None = None  # ControlNets that `guider` was made for
        self.guider: Guider | None = None

    def at(self, log_snr: Tensor) -> Guider:
        """The predictor at a level of noise, the same for each image (B,)."""
        controls = self.controls
        active = controls.active_at(log_snr[0]) if controls and controls.residuals else frozenset()
        if self.guider is None or active != self.active:
            self.active, self.guider = active, self._make(active)
        return self.guider

    def _make(self, active: frozenset) -> Guider:
        sides = self.conditions
        if self.controls is not None:
            sides = [
                {**side, "control": self.controls.merged(prompt.controlnets, active)}
                for side, prompt in zip(sides, self.prompts, strict=True)
            ]
        model: Any = self.stage.engine if self.with_engine else self.stage.network
        dtype = compute_dtype(self.stage.network)
        if self.stage.kind == "stage_b":
            model = in_tiles(model, self.tile_positions, self.stage.device.observer.check_interrupted)
        positive, negative = sides
        return Guider(model, positive, negative, self.guidance.cfg, self.guidance.cfg_rescale, dtype)


def in_tiles(
    network: StageB | Engine, tile_positions: int, check_interrupted: Callable[[], object]
) -> Callable[..., Tensor]:
    """Stage B as a function that predicts a latent of any size in tiles of `tile_positions` a side, or whole (0).

    Can be stopped between tiles.
    """

    patch_size = network.config.patch_size

    def whole(x: Tensor, r: Tensor, effnet: Tensor, **conditions: Any) -> Tensor:
        def predict(part: Tensor, seen: Tensor) -> Tensor:
            check_interrupted()
            return in_whole_patches(
                lambda patches: network(patches, r, effnet=seen, **conditions), part, patch_size
            )

        if not tile_positions:
            return predict(x, effnet)
        return predict_in_tiles(predict, x, effnet, tile_positions, patch_size)

    return whole


def _stage_c_conditions(prompt: Prompt, config: Any) -> dict[str, Tensor]:
    return {
        "clip_text": prompt.states,
        "clip_text_pooled": prompt.pooled[:, None],
        "clip_img": prompt.image_tokens(config.c_clip_img),
    }


def _stage_b_conditions(prompt: Prompt, config: Any) -> dict[str, Tensor]:
    if prompt.effnet is None:
        raise CascadeError("Stage B was given no latent of Stage C; sample or encode one first.")
    return {"clip": prompt.pooled[:, None], "effnet": prompt.effnet}


CONDITIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "stage_c": _stage_c_conditions,
    "stage_b": _stage_b_conditions,
}


def load_stage(kind: str, path: Path, dtype: str, device: ComputeDevice) -> DiffusionStage:
    """Stage C or Stage B (`kind` stage_c, stage_b) from a file of any layout. dtype: one of DTYPES."""
    precision = device.weight_dtype(dtype)
    network: Any
    network, kind, _ = load_model(
        path,
        expect=kind,
        dtype=precision,
        notify=device.observer.notify,
        placed=device.places,
        eight_bit=FORMATS.get(dtype),
        quantise_on=device.device,
    )
    if kind == "stage_c" and precision == torch.float16:
        scale_residual_stream(network)
    engine = Engine(network, True, device.observer.notify)
    engine.compile_in_background(device.device)
    return DiffusionStage(kind, path.name, network, engine, device)


def min_latent_side(kind: str, config: Any) -> int:
    """The side of the smallest latent that a network can take: Stage B halves it from level to level."""
    return config.patch_size * 2 ** (len(config.c_hidden) - 1) if kind == "stage_b" else 1


def stage_b_tile(tile_size: int) -> int:
    """The side of Stage B's tiles in latent positions, from pixels, rounded to its levels; 0: whole.

    Raises CascadeError for tiles that are too small.
    """
    if tile_size == 0:
        return 0
    if tile_size < LEAST_TILE:
        raise CascadeError(f"tile_size is {tile_size}; give 0 for no tiles, or {LEAST_TILE} or more.")
    return tile_size // STAGE_B_COMPRESSION // ALIGNMENT * ALIGNMENT


def checked_semantic(latent: Any) -> Tensor:
    """A latent of Stage C (B, C, h, w) in float32 in main memory.  Raises CascadeError for anything else."""
    if not isinstance(latent, Tensor):
        raise CascadeError(
            f"latent is of type {type(latent).__name__}; give the tensor that prior or encode gave."
        )
    values = finite_values(latent, "latent")
    if values.ndim != 4 or 0 in values.shape:
        raise CascadeError(
            f"latent has the shape {quoted(tuple(values.shape))}, but Stage C's is (batch, channels, h, w); give what "
            "prior or encode gave."
        )
    return values


def check_channels(latent: Tensor, stage: DiffusionStage) -> None:
    """Raises CascadeError for a latent (B, C, h, w) that is not Stage C's.

    stage: Stage B, which is conditioned on it, or Stage C, which starts from it
    """
    config = stage.network.config
    channels = config.c_effnet if stage.kind == "stage_b" else config.c_in
    if latent.shape[1] != channels:
        raise CascadeError(
            f"latent has {latent.shape[1]} channels, but Stage C's has {channels}; give what prior or encode gave."
        )


def check_widths(prompt: Prompt, stage: DiffusionStage) -> None:
    """Raises CascadeError where a text encoder's vectors are not as wide as Stage C takes them."""
    config = stage.network.config
    for vectors, width in ((prompt.states, config.c_clip_text), (prompt.pooled, config.c_clip_text_pooled)):
        if vectors.shape[-1] != width:
            raise CascadeError(
                f"The text encoder gives vectors of width {vectors.shape[-1]}, but {stage.described} takes {width}; "
                "load the text encoder that belongs to it."
            )
