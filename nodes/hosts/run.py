"""Description of a MODEL and of a sampling request, the same for both hosts."""

from dataclasses import dataclass
from typing import Any

from ...cascade_core.geometry import STAGE_C_COMPRESSION
from ...cascade_core.run import SamplingRun


@dataclass(frozen=True)
class NetworkDescription:
    """Description of a MODEL.

    kind             stage_c, stage_b, or None for any other model
    name             in words, for messages, such as "a Stage B model"
    widths           of its inputs: text, pooled, image (absent where it takes none)
    channels         of its latent
    min_latent_side  of the smallest latent that it can take
    """

    kind: str | None
    name: str
    widths: dict[str, int]
    channels: int = 0
    min_latent_side: int = 1


@dataclass(frozen=True)
class SamplingRequest:
    """A sampling run with its MODEL and prompts.

    kind            stage_c or stage_b
    run             with the latent and its mask in the units of sockets
    tile_positions  of Stage B: side of a tile in latent positions, 0: whole
    engine          whether the engine is called where it can be
    compression     pixels per position of Stage C's latent
    """

    kind: str
    model: Any
    positive: list
    negative: list
    run: SamplingRun
    cfg: float
    cfg_rescale: float
    tile_positions: int = 0
    engine: bool = True
    compression: float = STAGE_C_COMPRESSION
