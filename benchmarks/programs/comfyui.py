"""ComfyUI: its own modules in our loop, and its own sampling of the same weights, all of them on the device.

The checkout given by --comfyui or COMFYUI_PATH (the last of several) is imported into this process.
"""

import importlib
import os
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from networks import Setup, latent_shape, random_prompts
from picture import Program, Sampling
from programs.ours import Ours

MODULES, SAMPLING = "ComfyUI's modules", "ComfyUI"
MODULE_NAMES = (
    "model_management",
    "model_patcher",
    "sample",
    "sd",
    "supported_models",
    "ldm.cascade.stage_a",
)
UNITS = 0.43  # scale of ComfyUI's Stage A input relative to Stage B's latents


def find_checkout(stated: Path | None) -> Path | None:
    paths = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    path = stated or (paths[-1] if paths else None)
    return path if path is not None and (path / "comfy").is_dir() else None


class ComfyUI:
    """ComfyUI's classes around our weights, not copied. Raises ImportError where a dependency is missing."""

    def __init__(self, checkout: Path, setup: Setup, ours: Ours):
        self.setup, self.ours = setup, ours
        self.comfy = _imported(checkout, setup.device)

    @cached_property
    def models(self) -> dict[str, Any]:
        """Stage C and B as made by its loaders, each in its patcher."""
        classes = self.comfy.supported_models
        management = self.comfy.model_management
        patchers = self.comfy.model_patcher
        patcher = getattr(patchers, "CoreModelPatcher", patchers.ModelPatcher)
        models = {}
        for kind, model_class in (
            ("stage_c", classes.Stable_Cascade_C),
            ("stage_b", classes.Stable_Cascade_B),
        ):
            config = model_class(dict(self.setup.configs[kind]))
            config.set_inference_dtype(self.setup.dtype, None)
            base = config.get_model({}, device="meta")
            _share(base.diffusion_model, self.ours.network(kind))
            models[kind] = patcher(
                base.to(self.setup.device),
                load_device=management.get_torch_device(),
                offload_device=torch.device("cpu"),
            )
        return models

    @cached_property
    def stage_a(self) -> nn.Module:
        names = ("levels", "bottleneck_blocks", "c_hidden", "c_latent", "codebook_size")
        config = {name: value for name, value in self.setup.configs["stage_a"].items() if name in names}
        with torch.device("meta"):
            network = self.comfy.stage_a.StageA(**config)
        return _share(network, self.ours.network("stage_a"))

    @cached_property
    def vae(self) -> Any:
        """ComfyUI's VAE as built from a Stage A file, with this network in place of its own."""
        vae = self.comfy.sd.VAE(sd=self.comfy.stage_a.StageA().state_dict())
        vae.first_stage_model = self.stage_a.to(vae.vae_dtype)
        vae.patcher = self.comfy.model_patcher.ModelPatcher(
            self.stage_a, load_device=vae.device, offload_device=torch.device("cpu")
        )
        return vae

    def program(self) -> Program:
        c, b = (OnDevice(self.models[kind].model.diffusion_model) for kind in ("stage_c", "stage_b"))
        return Program(MODULES, c, b, lambda latents: self.stage_a.decode(latents * UNITS))  # pyright: ignore[reportCallIssue]

    def sampling(self) -> Sampling:
        return Sampling(SAMPLING, self.make)

    def make(self, batch: int) -> Tensor:
        """Pictures by its KSampler (ddpm, simple) and its VAE: (B, H, W, 3) in main memory"""
        prompts = [
            (prompt.states.cpu(), {"pooled_output": prompt.pooled.cpu()})
            for prompt in random_prompts(self.setup)
        ]
        prior = self._sample("stage_c", batch, prompts)
        with_prior = [
            (states, {**values, "stable_cascade_prior": latents})
            for (states, values), latents in zip(prompts, (prior, torch.zeros_like(prior)), strict=True)
        ]
        return self.vae.decode(self._sample("stage_b", batch, with_prior))

    def _sample(self, kind: str, batch: int, prompts: list[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        i = 0 if kind == "stage_c" else 1
        shape = (batch, *latent_shape(kind, self.setup.side))
        noise = torch.randn(shape, generator=torch.manual_seed(0))
        positive, negative = ([[states, values]] for states, values in prompts)
        return self.comfy.sample.sample(
            self.models[kind], noise, self.setup.steps[i], self.setup.cfg[i], "ddpm", "simple", positive, negative,
            torch.zeros(shape), disable_pbar=True, seed=0,
        )  # fmt: skip


class OnDevice:
    """ComfyUI's network with noise conditions moved to the device, since our samplers pass them on the CPU."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.parameters = network.parameters

    def __call__(self, x: Tensor, r: Tensor, **conditions: Any) -> Tensor:
        return self.network(x, r.to(x.device), **conditions)


def _imported(checkout: Path, device: torch.device) -> SimpleNamespace:
    """Imports ComfyUI's modules, which choose their device at import."""
    sys.path.append(str(checkout))
    importlib.import_module("comfy.cli_args").args.cpu = device.type == "cpu"
    modules = {name.rpartition(".")[2]: importlib.import_module(f"comfy.{name}") for name in MODULE_NAMES}
    return SimpleNamespace(**modules)


def _share(network: nn.Module, ours: nn.Module) -> nn.Module:
    """Assigns the same tensors to another program's network of the same names."""
    network.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return network.eval().requires_grad_(False)
