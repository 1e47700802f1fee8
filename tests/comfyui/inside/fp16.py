"""Stage C in fp16: a network built to overflow, as on a card without bf16. The CPU stands in for the card."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import comfy.model_management
import comfy.sd
import torch
from comparing import relative
from interop import make_run
from torch import Tensor

from cascade_nodes.cascade_core import StageC, checkpoints
from cascade_nodes.nodes.hosts import comfyui
from cascade_nodes.tests.core.overflowing import STAGE_C, overflowing

MAPPED = "up_blocks.1.0.channelwise.4"  # a layer that adds to the stream; it is given a LoRA


@contextmanager
def card_without_bf16() -> Iterator[None]:
    """What ComfyUI finds out about the device while a file is loaded."""
    management: Any = comfy.model_management
    before = management.should_use_fp16
    management.should_use_fp16 = lambda *_, **__: True
    try:
        yield
    finally:
        management.should_use_fp16 = before


def prompts() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(2)

    def prompt() -> list:
        pooled = torch.randn(1, 32, generator=generator)
        return [[torch.randn(1, 20, 32, generator=generator), {"pooled_output": pooled}]]

    return prompt(), prompt()


def lora(folder: Path, weights: dict[str, Tensor]) -> Path:
    rows, columns = weights[f"{MAPPED}.weight"].shape
    tensors = {
        "lora_up.weight": torch.randn(rows, 4) * weights[f"{MAPPED}.weight"].std(),
        "lora_down.weight": torch.randn(4, columns) / 2,
        "alpha": torch.tensor(4.0),
    }
    name, path = "lora_unet_" + MAPPED.replace(".", "_"), folder / "lora.safetensors"
    checkpoints.write_safetensors(path, {f"{name}.{part}": t for part, t in tensors.items()}, {})
    return path


def precisions(path: Path) -> dict[str, str]:
    """What each choice of dtype is kept and computed in, on such a card."""
    values = {}
    for dtype in ("auto", "bf16", "fp8", "int8", "fp16", "fp32"):
        with card_without_bf16():
            model = comfyui.load_network("stage_c", path, dtype).model
        values[dtype] = f"{model.get_dtype()}, {model.manual_cast_dtype}".replace("torch.", "")
    return values


def measure() -> dict[str, Any]:
    network = StageC.from_config(STAGE_C)
    overflowing(network)
    weights, (positive, negative) = network.state_dict(), prompts()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "stage_c.safetensors"
        checkpoints.write_safetensors(path, weights, {"kind": "stage_c", "config": json.dumps(STAGE_C)})
        reference = comfyui.load_network("stage_c", path, "fp32")
        with card_without_bf16():
            half = comfyui.load_network("stage_c", path, "fp16")
        adapter = checkpoints.read_safetensors(lora(Path(name), weights))[0]
        values = precisions(path)
    assert half.model.manual_cast_dtype is None

    def sampled(model: Any) -> Tensor:
        run = make_run(
            "stage_c", model, (positive, negative), latent=torch.zeros(1, 16, 7, 10), steps=20, sampler="ddpm",
            cfg=4.0, cfg_rescale=0.7, shift=2.0,
        )  # fmt: skip
        return comfyui.sample(run).latent

    def with_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 1.0)[0]

    plain, changed = sampled(reference), sampled(with_lora(reference))
    hosted = half.model.diffusion_model
    state, forwards = hosted.state_dict(), Mock(side_effect=hosted.network.forward)
    with patch.object(hosted.network, "forward", forwards):
        halves = [sampled(half), sampled(with_lora(half)), sampled(half)]
    return {
        "fp16": relative(halves[0], plain),
        "fp16 with a LoRA": relative(halves[1], changed),
        "after the LoRA": relative(halves[2], plain),
        "forwards without the engine": forwards.call_count,
        "the LoRA's own effect": relative(changed, plain),
        "weights as in the file": all(torch.equal(state[name], weights[name].half()) for name in weights),
        "precisions": values,
    }
