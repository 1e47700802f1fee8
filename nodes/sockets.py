"""Checks of the values on sockets, before and after a network runs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..cascade_core.checkpoints import KIND_NAMES
from ..cascade_core.errors import CascadeError, quoted
from ..cascade_core.geometry import STAGE_B_COMPRESSION
from ..cascade_core.stages.weights import check_finite_output
from .hosts import host
from .hosts.run import NetworkDescription

VAE_WORDS = {"stage_a": "Stage A", "compressor": "the semantic compressor"}

_LITERALS = str | int | float | list | dict  # types that a graph can have in place of a connection


def check_connected(value: Any, socket: str, source: str) -> None:
    """Raises CascadeError for a plain value in place of a connection, which ComfyUI lets through."""
    if isinstance(value, _LITERALS):
        raise CascadeError(f"{socket} is {quoted(value)}, but a connection is expected; connect {source}.")


def check_network(model: Any, kind: str, node: str, loader: str) -> NetworkDescription:
    """Returns the MODEL's description. Raises CascadeError for another kind, by name."""
    if model is None:
        raise CascadeError(f"{node} got no MODEL; connect {loader}.")
    check_connected(model, f"The MODEL of {node}", loader)
    network = host().describe_network(model)
    if network.kind != kind:
        raise CascadeError(
            f"The MODEL connected to {node} is {network.name}, but {KIND_NAMES[kind]} is expected; connect "
            f"{loader}."
        )
    return network


def check_vae(vae, kind: str, node: str, loader: str) -> None:
    """Raises CascadeError for a VAE of another kind, by name."""
    check_connected(vae, f"The VAE of {node}", loader)
    vae_kind = host().describe_vae(vae) if vae is not None else "nothing"
    if vae_kind != kind:
        raise CascadeError(
            f"The VAE connected to {node} is {VAE_WORDS.get(vae_kind, vae_kind)}, but {VAE_WORDS[kind]} is "
            "expected; "
            f"connect {loader}."
        )


def check_picture(image: Tensor, socket: str) -> None:
    """Raises CascadeError unless an IMAGE is (B, H, W, C), without a size of 0, and all finite."""
    shape = _shape(image, socket, "an IMAGE")
    if len(shape) != 4 or 0 in shape:
        raise CascadeError(
            f"{socket} has the shape {shape}, but (batch, height, width, channels) was expected; connect an IMAGE."
        )
    if not torch.isfinite(image).all():
        raise CascadeError(f"{socket} holds NaN or infinity; make the picture anew.")


def check_mask(mask: Tensor, socket: str) -> None:
    """Raises CascadeError unless a MASK is (B, H, W), without a size of 0."""
    shape = _shape(mask, socket, "a MASK")
    if len(shape) < 2 or 0 in shape:
        raise CascadeError(
            f"{socket} has the shape {shape}, but (batch, height, width) was expected; connect a MASK."
        )


def latent_shape(latent: dict, socket: str) -> tuple[int, ...]:
    """The shape of a LATENT's samples. Raises CascadeError for what is not a LATENT."""
    if not isinstance(latent, dict) or "samples" not in latent:
        raise CascadeError(f"{socket} is {quoted(latent)}, but a LATENT is expected; connect one.")
    return _shape(latent["samples"], socket, "a LATENT")


def _shape(tensor: Any, socket: str, kind: str) -> tuple[int, ...]:
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or kind == "a MASK"):
        shown = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else quoted(tensor)
        raise CascadeError(f"{socket} is {shown}, but {kind} is expected; connect one.")
    return tuple(tensor.shape)


def check_latent(latent: dict, network: NetworkDescription, socket: str, source: str) -> None:
    """Raises CascadeError unless a LATENT is (B, C, h, w), with the network's channels and one index for each row."""
    shape = latent_shape(latent, socket)
    if len(shape) != 4 or shape[1] != network.channels or 0 in shape:
        raise CascadeError(
            f"{socket} has the shape {shape}, but {network.name} samples latents of {network.channels} "
            "channels; "
            f"connect {source}."
        )
    indices = latent.get("batch_index")
    if indices is not None and len(indices) != shape[0]:
        raise CascadeError(
            f"{socket} holds {shape[0]} latents but {len(indices)} batch indices; give one for each."
        )


def check_min_side(latent: dict, network: NetworkDescription) -> None:
    """Raises CascadeError for a Stage B latent that would vanish at the network's innermost level."""
    height, width = latent["samples"].shape[-2:]
    if min(height, width) < network.min_latent_side:
        min_pixels = network.min_latent_side * STAGE_B_COMPRESSION
        raise CascadeError(
            f"The picture is {width * STAGE_B_COMPRESSION} × {height * STAGE_B_COMPRESSION} pixels, but "
            f"{network.name} makes none with a side under {min_pixels}; choose a larger width and height."
        )


def check_conditioning(conditioning: list, network: NetworkDescription, socket: str) -> None:
    """Raises CascadeError unless every prompt's vectors have the network's widths."""
    check_prompts(conditioning, socket)
    if not conditioning:
        raise CascadeError(f"{socket} holds no prompt; connect Cascade Text Encode.")
    for tokens, values in conditioning:
        pooled = values.get("pooled_output")
        if not isinstance(pooled, Tensor):
            raise CascadeError(
                f"{socket} has no pooled text vector, which {network.name} needs; connect Cascade Text "
                "Encode with the "
                "text encoder of this model."
            )
        widths = {"text": tokens.shape[-1], "pooled": pooled.shape[-1]}
        for prompt in values.get("unclip_conditioning") or []:
            widths["image"] = prompt["clip_vision_output"].image_embeds.shape[-1]
        _check_widths(widths, network, socket)


def check_prompts(conditioning: list, socket: str) -> None:
    """Raises CascadeError unless a CONDITIONING is a list of prompts, each its states (1, T, C) and a dictionary."""
    prompts = conditioning if isinstance(conditioning, list) else [conditioning]
    for prompt in prompts:
        pair = prompt if isinstance(prompt, list | tuple) and len(prompt) == 2 else (prompt, None)
        if not (isinstance(pair[0], Tensor) and isinstance(pair[1], dict)):
            raise CascadeError(
                f"{socket} holds {quoted(prompt)}, but a CONDITIONING is expected; connect Cascade Text Encode."
            )


WIDTH_WORDS = {
    "text": ("text states", "text encoder"),
    "pooled": ("the pooled text vector", "text encoder"),
    "image": ("the image embedding", "image encoder"),
}


def _check_widths(widths: dict[str, int], network: NetworkDescription, socket: str) -> None:
    for name, expected in network.widths.items():
        if name in widths and widths[name] != expected:
            words, encoder = WIDTH_WORDS[name]
            raise CascadeError(
                f"{socket}: {words} of width {widths[name]} do not fit {network.name}, which takes "
                f"{expected}; "
                f"load the {encoder} that belongs to this model."
            )


def check_finite(tensors: Iterable[Tensor | None], model: Any, subject: str, *advice: str) -> None:
    """Raises CascadeError where the output of a MODEL, CLIP, VAE or CLIP_VISION holds NaN or infinity.

    Names the weight at fault, or gives `advice` where every weight is finite.
    """
    check_finite_output(tensors, lambda: host().first_non_finite(model), subject, *advice)


def with_values(conditioning: list, **values: Any) -> list:
    """Copies the conditioning and adds these values to every prompt."""
    return [[tokens, {**prompt_values, **values}] for tokens, prompt_values in conditioning]


def without_values(conditioning: list, *names: str) -> list:
    """Copies the conditioning and removes these values from every prompt."""
    return [
        [tokens, {name: prompt_values[name] for name in prompt_values if name not in names}]
        for tokens, prompt_values in conditioning
    ]
