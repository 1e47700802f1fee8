"""The kinds of ControlNet: one table, which settings, nodes, training and the catalogue of files read."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

KindName = Literal["canny", "inpainting", "super_resolution", "identity"]  # in settings and file names
Backbone = Literal["effnet", "large", "simple"]


@dataclass(frozen=True, slots=True)
class ControlNetKind:
    """A published ControlNet.

    channels  of its hint
    backbone  of the network: "effnet" reads pixels, the others one value per position of Stage C's latent
    node      display name of the node that makes the hint from a picture
    """

    name: KindName
    channels: int
    backbone: Backbone
    node: str


KINDS: Mapping[str, ControlNetKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ControlNetKind("canny", 1, "effnet", "Cascade Canny"),
            ControlNetKind("inpainting", 4, "effnet", "Cascade Inpaint Hint"),
            ControlNetKind("super_resolution", 16, "large", "Cascade Super Resolution Hint"),
            ControlNetKind("identity", 512, "simple", "Cascade Identity Hint"),
        )
    }
)


def kind_of(channels: int) -> ControlNetKind | None:
    """The kind whose hint has this number of channels, or None."""
    return next((kind for kind in KINDS.values() if kind.channels == channels), None)
