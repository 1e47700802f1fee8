"""Runs a file's networks on fixed inputs, and condenses outputs to numbers that two machines can compare.

Weights stay mapped in the file's precision; each layer's are cast to float32 while it computes. So a network takes
the memory of its largest layer, and the results of a 16-bit file are free of 16-bit rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...cascade_core.checkpoints import load_model
from ...cascade_core.stages.diffusion import min_latent_side
from ...cascade_core.text.encoder import TextEncoder
from ...cascade_core.vision import ImageEncoder

SEED = 0
PROMPT = "a lighthouse in a storm, oil painting"
ROWS = 2  # of Stage B and C, each with its own noise condition
NOISE_CONDITIONS = (0.9, 0.1)
TOKENS = 77
PARTS_OF_OUTPUT = 64  # whose means make the digest

Outputs = dict[str, Tensor]


def load_network(path: Path, part: str) -> Any:
    """A network of a file for `outputs_of`: a module, or CLIP's encoder with its tokenizer or preparation.

    Only CLIP is cast as a whole, because transformers reads the dtype of its weights.
    """
    if part == "text":
        return TextEncoder.load(path, torch.float32)
    if part == "vision":
        return ImageEncoder.load(path, torch.float32)
    network, _, _ = load_model(path, expect=part, read_ahead=False)
    return network


def fixed_inputs(part: str, network: Any) -> dict[str, Any]:
    """Small inputs for a network, the same at every call; names are those of its forward."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if part == "text":
        return {"prompt": PROMPT}
    if part == "vision":
        # In 8-bit steps and at the network's own size, so that nothing is rounded or resized.
        side = network.image_size
        return {"image": (255 * uniform(1, side, side, 3)).round() / 255}
    config = network.config
    if part == "stage_c":
        return {
            "x": normal(ROWS, config.c_in, 12, 12),
            "r": torch.tensor(NOISE_CONDITIONS),
            "clip_text": normal(ROWS, TOKENS, config.c_clip_text),
            "clip_text_pooled": normal(ROWS, 1, config.c_clip_text_pooled),
            "clip_img": normal(ROWS, 1, config.c_clip_img),
        }
    if part == "stage_b":
        side = 2 * min_latent_side(part, config)
        return {
            "x": normal(ROWS, config.c_in, side, side),
            "r": torch.tensor(NOISE_CONDITIONS),
            "effnet": normal(ROWS, config.c_effnet, 3, 3),
            "clip": normal(ROWS, 1, config.c_clip),
        }
    if part == "stage_a":
        side = 16 * 2**config.levels
        return {"latent": normal(1, config.c_latent, 16, 16), "image": uniform(1, 3, side, side)}
    if part == "compressor":
        return {"image": uniform(1, 3, 128, 128)}
    if part == "previewer":
        return {"latent": normal(1, config.c_in, 8, 8)}
    side = 4 * config.hint_scale
    return {"hint": uniform(1, config.c_in, side, side)}


@torch.no_grad()
def outputs_of(part: str, network: Any, inputs: dict[str, Any]) -> Outputs:
    """Outputs of a network of `load_network` for its fixed inputs, in float32, by name."""
    if part == "text":
        states, pooled = network.encode([inputs["prompt"]])
        return {"states": states, "pooled": pooled}
    if part == "vision":
        return {"embeds": network.encode(inputs["image"])}
    with computing_in_float32(network):
        return _MODULES[part](network, inputs)


def _stage_a(network: Any, inputs: dict[str, Any]) -> Outputs:
    return {"picture": network.decode(inputs["latent"]), "latent": network.encode(inputs["image"])}


def _controlnet(network: Any, inputs: dict[str, Any]) -> Outputs:
    residuals = [residual for residual in network(inputs["hint"]) if residual is not None]
    return {"residuals": torch.stack(residuals)}


_MODULES: dict[str, Callable[[Any, dict[str, Any]], Outputs]] = {
    "stage_c": lambda network, inputs: {"epsilon": network(**inputs)},
    "stage_b": lambda network, inputs: {"epsilon": network(**inputs)},
    "stage_a": _stage_a,
    "compressor": lambda network, inputs: {"latent": network(inputs["image"])},
    "previewer": lambda network, inputs: {"picture": network(inputs["latent"])},
    "controlnet": _controlnet,
}


@contextmanager
def computing_in_float32(network: nn.Module) -> Iterator[None]:
    """Within the block every layer computes in float32, from copies of its weights that exist only meanwhile."""
    stored: dict[int, Tensor] = {}  # by id of the cast tensor

    def cast(module: nn.Module, _: Any) -> None:
        for tensor in _own_tensors(module):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                stored[id(tensor)], tensor.data = tensor.data, tensor.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for tensor in _own_tensors(module):
            if id(tensor) in stored:
                tensor.data = stored.pop(id(tensor))

    hooks = [
        hook
        for module in network.modules()
        if next(_own_tensors(module), None) is not None
        for hook in (
            module.register_forward_pre_hook(cast),
            module.register_forward_hook(restore, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module itself, which its forward reads."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def statistics(values: Tensor) -> dict[str, Any]:
    """An output in a few numbers.

    values  eight of them, evenly spaced
    digest  of the means of 64 equal parts in hundredths of the deviation, so that rounding rarely changes it
    """
    flat = values.detach().float().cpu().flatten().double()
    parts = torch.stack([part.mean() for part in flat.tensor_split(min(PARTS_OF_OUTPUT, len(flat)))])
    deviation = flat.std(correction=0)
    steps = (100 * parts / deviation.clamp(min=1e-12)).round().nan_to_num().long().tolist()
    places = torch.linspace(0, len(flat) - 1, 8).long()
    return {
        "shape": list(values.shape),
        "mean": number(flat.mean()),
        "std": number(deviation),
        "min": number(flat.min()),
        "max": number(flat.max()),
        "values": [number(value) for value in flat[places]],
        "digest": hashlib.sha256(repr(steps).encode()).hexdigest()[:12],
    }


def difference(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Difference of two outputs: its maximum, absolute and relative to the largest value of `theirs`."""
    ours, theirs = (values.detach().cpu().double() for values in (ours, theirs))
    largest = (ours - theirs).abs().max()
    return {"maximum": number(largest, 3), "relative": number(largest / theirs.abs().max(), 3)}


def number(value: Tensor | float, digits: int = 5) -> float | str:
    """A number with this many digits for JSON; NaN and infinity, which JSON lacks, as text."""
    rounded = float(f"{float(value):.{digits}g}")
    return rounded if rounded - rounded == 0 else str(rounded)
