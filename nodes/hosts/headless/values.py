"""Names of the values on sockets, for messages."""

from typing import Any

from ....cascade_core.stages.codec import Codec
from ....cascade_core.stages.control import ControlNetStage
from ....cascade_core.stages.diffusion import DiffusionStage
from ....cascade_core.stages.prompt import TextStage, VisionStage

_SOCKETS: dict[type, str] = {
    DiffusionStage: "MODEL",
    TextStage: "CLIP",
    Codec: "VAE",
    VisionStage: "CLIP_VISION",
    ControlNetStage: "CONTROL_NET",
}


def words_for(value: Any) -> str:
    """A value in words by its socket type, such as "a VAE", or else by its class."""
    return f"a {_SOCKETS.get(type(value), type(value).__name__)}"
