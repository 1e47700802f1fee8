"""A graphics card in main memory, on which ComfyUI's own memory manager runs against our patcher; and small networks.

The card is cpu:0, which ComfyUI takes for another device than cpu, and PyTorch for the same. The manager's questions
about its memory are answered by counting the live buffers on it.
"""

import builtins
import json
import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import torch
from interop import make_run
from torch import Tensor, nn

from cascade_nodes.cascade_core.checkpoints import NETWORKS, write_safetensors
from cascade_nodes.cascade_core.networks.quantisation import FORMATS
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.nodes.hosts.comfyui.patcher import CascadePatcher
from cascade_nodes.nodes.hosts.comfyui.residence import Residence
from cascade_nodes.tests.core.placements import Late

LOAD, OFFLOAD = torch.device("cpu", 0), torch.device("cpu")
MINIMUM = 64 << 20  # bytes that the manager keeps for inference, in place of 0.8 GiB
RESERVED = 8 << 20  # of them for other programs, in place of 400 MiB
LEAST_BUDGET = 128 << 20  # that 0.3.64 gives any network: more than all of those here
TABLES: dict[tuple[float, float], dict[str, Any]] = {}  # of schedules
SET_PARAMETERS = comfy.model_sampling.StableCascadeSampling.set_parameters
UNIT_BYTES = 100 << 10  # fifteen units of Stage C, ten of Stage B


class Card(Late):
    """A card of `size` bytes, of which `ballast` are somebody else's; copies are late, as in its base."""

    def __init__(self, size: float):
        super().__init__(int(size))
        self.ballast = self.allocations = 0

    @property
    def free(self) -> int:
        return self.size - self.now - self.ballast

    def empty(self, size: int) -> Tensor:
        self.allocations += 1
        if size > self.free:
            raise torch.OutOfMemoryError(f"Tried to allocate {size} bytes, {self.free} are free.")
        return super().empty(size)


@contextmanager
def inserted(card: Card) -> Iterator[Card]:
    """ComfyUI with that card in place of the processor, and without the models loaded before."""

    def free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        return (card.free, 0) if torch_free_too else card.free

    def set_parameters(schedule: Any, shift: float = 1.0, cosine_s: float = 8e-3) -> None:
        if (shift, cosine_s) not in TABLES:  # which takes half a second
            SET_PARAMETERS(schedule, shift, cosine_s)
            TABLES[shift, cosine_s] = vars(schedule) | {"sigmas": schedule.sigmas.clone()}
        table = TABLES[shift, cosine_s]
        for name in ("shift", "cosine_s", "_init_alpha_cumprod", "num_timesteps"):
            setattr(schedule, name, table[name])
        schedule.set_sigmas(table["sigmas"].clone())

    def largest(*values: Any) -> Any:
        kept = [value for value in values if value != LEAST_BUDGET]
        return builtins.max(*(kept if len(kept) > 1 else values))

    changes = {
        "is_device_cpu": lambda device: device == OFFLOAD,
        "get_torch_device": lambda: LOAD,
        "get_free_memory": free_memory,
        "get_total_memory": lambda *_, **__: card.size,
        "minimum_inference_memory": lambda: MINIMUM - RESERVED + management.extra_reserved_memory(),
        "extra_reserved_memory": lambda: RESERVED,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "current_loaded_models": [],
    }
    with (
        patch.multiple(management, **changes),
        patch.object(management, "max", largest, create=True),
        patch.object(comfy.model_sampling.StableCascadeSampling, "set_parameters", set_parameters),
    ):
        try:
            yield card
        finally:
            management.unload_all_models()


def card_for(weights: float) -> Card:
    """A card that has so many bytes for weights, beside what the manager keeps for inference."""
    return Card(weights + MINIMUM)


CONFIGS = {
    "stage_c": {
        "c_cond": 32,
        "c_hidden": [64, 64],
        "nhead": [2, 2],
        "blocks": [[1, 2], [2, 2]],
        "c_clip_text": 48,
        "c_clip_text_pooled": 40,
        "c_clip_img": 24,
        "c_clip_seq": 2,
        "c_r": 16,
    },
    "stage_b": {
        "c_cond": 32,
        "c_hidden": [32, 64],
        "nhead": [-1, 2],
        "blocks": [[1, 2], [2, 1]],
        "block_repeat": [[1, 1], [2, 2]],
        "level_config": ["CT", "CTA"],
        "dropout": [0, 0.1],
        "self_attn": [True, True],
        "c_clip": 40,
        "c_clip_seq": 2,
        "c_r": 16,
    },
}
LATENTS = {"stage_c": (1, 16, 6, 6), "stage_b": (1, 4, 16, 16)}
TEXT, POOLED = 48, 40


def write_networks(folder: Path) -> dict[str, Path]:
    """A Stage C and a Stage B of random weights, in which every weight counts, and another Stage C."""
    files = {}
    for seed, (name, kind) in enumerate(
        {"stage_c": "stage_c", "stage_b": "stage_b", "other": "stage_c"}.items()
    ):
        config = CONFIGS[kind]
        network = NETWORKS[kind].from_config(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.03)
        files[name] = folder / f"small_{name}.safetensors"
        write_safetensors(files[name], network.state_dict(), {"kind": kind, "config": json.dumps(config)})
    return files


def prompts(kind: str, seed: int = 1) -> tuple[Any, Any]:
    """A positive and a negative prompt, whose texts differ in length."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    extra = {} if kind == "stage_c" else {"stable_cascade_prior": random(1, 16, 3, 3)}
    positive, negative = (
        [[random(1, 7, TEXT), {"pooled_output": random(1, POOLED), **extra}]] for _ in range(2)
    )
    return positive, negative


def sample(kind: str, model: Any, **changed: Any) -> Tensor:
    """The latent of `sampled`."""
    return sampled(kind, model, **changed).latent


def sampled(kind: str, model: Any, **changed: Any) -> Any:
    """The result of two steps of our sampler, on the MODEL itself: its own schedule serves."""
    shift = model.get_model_object("model_sampling").shift
    settings = {"latent": torch.zeros(LATENTS[kind]), "shift": shift, "steps": 2, **changed}
    return comfyui.sample(make_run(kind, model, settings.pop("prompts", prompts(kind)), **settings))


def core(kind: str, path: Path, dtype: str = "fp32") -> Any:
    """A MODEL by our loader, in ComfyUI's own patcher; one with 8-bit weights in ours, as it is without a card."""
    loaded = comfyui.load_network(kind, path, dtype)
    patcher = CascadePatcher if dtype in FORMATS else comfy.model_patcher.ModelPatcher
    return patcher(loaded.model, load_device=LOAD, offload_device=OFFLOAD)


class CardPatcher(CascadePatcher):
    """Our patcher, to which that card is one of its own."""

    card: Card

    def _new_residence(self) -> Residence | None:
        if self.load_device != LOAD or self.offload_device == LOAD:
            return super()._new_residence()
        if self.backup or self.model.current_weight_patches_uuid is not None:
            comfy.model_patcher.ModelPatcher.unpatch_model(self, self.offload_device, unpatch_weights=True)
        return Residence(self.model.hosted, LOAD, self.card, unit_bytes=UNIT_BYTES)


def ours(kind: str, path: Path, card: Card, dtype: str = "fp32", offload: torch.device = OFFLOAD) -> Any:
    """A MODEL by our loader, placed on that card."""
    patcher = type("CardPatcher", (CardPatcher,), {"card": card})  # clones are of the same class
    return patcher(comfyui.load_network(kind, path, dtype).model, LOAD, offload)


def scenarios(runs: dict[str, Callable[[dict[str, Path]], Any]]) -> dict[str, Any]:
    """What each scenario found of the files of small networks, or {"error": …}; one that fails leaves the others."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        files = write_networks(Path(name))
        for scenario, run in runs.items():
            try:
                results[scenario] = run(files)
            except Exception:
                results[scenario] = {"error": traceback.format_exc()}
    return results


def uncounted(card: Card, *models: Any) -> int:
    """Bytes on the card that no MODEL says are its own. Patches' factors need none here: this card is main memory."""
    factors = [
        weight.device_bytes
        for model in models
        if model.model.residence is not None
        for weights in model.model.residence._patched.values()
        for weight in weights.values()
    ]
    return card.now + sum(factors) - sum(model.loaded_size() for model in models)


class Weights:
    """A MODEL's weights as they were loaded: which tensors they are in main memory, and a copy of their values."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.loaded = {name: tensor.detach() for name, tensor in network.state_dict().items()}
        self.values = {name: tensor.clone() for name, tensor in self.loaded.items()}

    def changed(self) -> list[str]:
        """Those of which the network's own, or what was loaded, differs by a bit."""
        own = self.network.state_dict()
        if own.keys() != self.values.keys():
            return sorted(own.keys() ^ self.values.keys())
        return [
            name
            for name, value in self.values.items()
            if not all(same(tensor[name], value) for tensor in (own, self.loaded))
        ]


def same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    one, two = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(one, two)


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged inside the block."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, root = Handler(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
