"""What is checked about the values on the sockets before a sampler runs."""

from typing import Any

from ..cascade_core.checkpoints import KIND_NAMES
from ..cascade_core.errors import CascadeError
from .hosts import host
from .hosts.run import Network


def check_network(model: Any, kind: str, node: str, loader: str) -> Network:
    """The MODEL's description; refuses another kind by name."""
    if model is None:
        raise CascadeError(f"{node} got no MODEL; connect {loader}.")
    network = host().describe_network(model)
    if network.kind != kind:
        raise CascadeError(
            f"The MODEL connected to {node} is {network.name}, but {KIND_NAMES[kind]} is expected; connect "
            f"{loader}."
        )
    return network


def check_latent(latent: dict, network: Network, socket: str, source: str) -> None:
    """A LATENT is (B, C, h, w), with the network's channels, and one index for each row where it has any."""
    shape = tuple(latent["samples"].shape)
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


def check_conditioning(conditioning: list, network: Network, socket: str) -> None:
    """Every prompt's vectors are as wide as the network takes them."""
    if not conditioning:
        raise CascadeError(f"{socket} holds no prompt; connect Cascade Text Encode.")
    for tokens, values in conditioning:
        pooled = values.get("pooled_output")
        if pooled is None:
            raise CascadeError(
                f"{socket} has no pooled text vector, which {network.name} needs; connect Cascade Text "
                "Encode with the "
                "text encoder of this model."
            )
        found = {"text": tokens.shape[-1], "pooled": pooled.shape[-1]}
        for prompt in values.get("unclip_conditioning") or []:
            found["image"] = prompt["clip_vision_output"].image_embeds.shape[-1]
        _check_widths(found, network, socket)


WIDTH_WORDS = {
    "text": ("text states", "text encoder"),
    "pooled": ("the pooled text vector", "text encoder"),
    "image": ("the image embedding", "image encoder"),
}


def _check_widths(found: dict[str, int], network: Network, socket: str) -> None:
    for what, expected in network.widths.items():
        if what in found and found[what] != expected:
            words, encoder = WIDTH_WORDS[what]
            raise CascadeError(
                f"{socket}: {words} of width {found[what]} do not fit {network.name}, which takes "
                f"{expected}; "
                f"load the {encoder} that belongs to this model."
            )


def with_values(conditioning: list, **values: Any) -> list:
    """A copy of the conditioning in which every prompt has these values as well."""
    return [[tokens, {**held, **values}] for tokens, held in conditioning]
