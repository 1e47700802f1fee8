"""ComfyUI's KSampler against ours on the demo's networks, in float32 and in float64: how much of it is rounding.

Both sides get the same noise and the same levels of noise. ComfyUI casts predictions by `Tensor.float`, which keeps
float64 here, as our own samplers do.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.k_diffusion.sampling
import comfy.sample
import native
import torch
from comparing import relative
from torch import Tensor

from cascade_nodes.cascade_core.checkpoints import load_model
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.run import by_log_snr, sample
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.headless.builtin.sampling import SHIFTS, KSamplerRun, simple_sigmas
from cascade_nodes.nodes.hosts.roles import DEMO_NAMES

SEED, STEPS, CFG, SIDE = 5, 5, 4.0, {"stage_c": 6, "stage_b": 64}
UNITS = {"stage_c": 1.0, "stage_b": 0.43}
to_float = torch.Tensor.float


class PreciseRun(KSamplerRun):
    """A run whose levels are computed in the precision of its latent."""

    def log_snrs(self) -> Tensor:
        return -2 * simple_sigmas(self.steps, self.shift).to(self.latent.dtype).log()


@contextmanager
def keeping_float64() -> Iterator[None]:
    """Context in which ComfyUI computes in float64 where it is given that, with our noise."""

    def noise_sampler(x: Tensor, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed + 1)
        return lambda *_: torch.randn(x.shape, generator=generator).to(x)

    def at_least_float(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else to_float(value)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "float", at_least_float))
        stack.enter_context(patch.object(comfy.k_diffusion.sampling, "default_noise_sampler", noise_sampler))
        yield


def conditions(kind: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Ours, of both prompts, by the names of the network's arguments."""
    random = torch.Generator().manual_seed(SEED)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    if kind == "stage_b":
        return [{"clip": values(1, 1, 192), "effnet": values(1, 16, 6, 6)} for _ in range(2)]
    image = torch.zeros(1, 1, native.IMAGE_WIDTH, dtype=dtype)
    return [
        {"clip_text": values(1, 77, 192), "clip_text_pooled": values(1, 1, 192), "clip_img": image}
        for _ in range(2)
    ]


def as_comfyui(prompt: dict[str, Tensor]) -> list[Any]:
    """A prompt of ours as a CONDITIONING."""
    if "effnet" in prompt:
        values = {"pooled_output": prompt["clip"][0], "stable_cascade_prior": prompt["effnet"]}
        return [[prompt["clip"], values]]
    return [[prompt["clip_text"], {"pooled_output": prompt["clip_text_pooled"][0]}]]


def both(kind: str, path: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The latent by our sampler and network, and by ComfyUI's."""
    channels = {"stage_c": 16, "stage_b": 4}[kind]
    latent = torch.zeros(1, channels, SIDE[kind], SIDE[kind], dtype=dtype)
    run = PreciseRun(latent, SEED, STEPS, SHIFTS[kind])
    network: Any = load_model(path, kind, torch.float32)[0].to(dtype)
    positive, negative = conditions(kind, dtype)
    ours = sample(run, by_log_snr(Guider(network, positive, negative, CFG, 0.0))) * UNITS[kind]
    model = native.model(kind, path, dtype)
    scaling = model.model.model_sampling
    with_noise = scaling.noise_scaling  # newer versions cast the noise to float32 before
    scaling.noise_scaling = lambda sigma, noise, *others: with_noise(sigma, noise.to(dtype), *others)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    sigmas = simple_sigmas(STEPS, SHIFTS[kind]).to(dtype)
    theirs = comfy.sample.sample(
        model, noise, STEPS, CFG, "euler_ancestral", "simple", as_comfyui(positive), as_comfyui(negative), latent,
        sigmas=sigmas, disable_pbar=True, seed=SEED,
    )  # fmt: skip
    return ours.to(torch.float64), theirs.to(torch.float64)


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, keeping_float64():
        paths = {
            "stage_c": native.wide_stage_c(Path(folder)),
            "stage_b": WEIGHTS / DEMO_NAMES["stage_b"],
        }
        return {
            f"{kind} {dtype}": relative(*both(kind, path, dtype))
            for kind, path in paths.items()
            for dtype in (torch.float32, torch.float64)
        }
