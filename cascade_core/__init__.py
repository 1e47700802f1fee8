"""Stable Cascade in pure PyTorch: the networks, their checkpoints, diffusion and sampling, text and vision.

Names are imported when they are first used, so that a command line that only wants `CascadeError` starts without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CascadeError

if TYPE_CHECKING:
    from .checkpoints import load_model, load_published_state_dict
    from .networks.compressor import SemanticCompressor
    from .networks.controlnet import ControlNet
    from .networks.inference import infer_config
    from .networks.previewer import Previewer
    from .networks.stage_a import StageA
    from .networks.stage_b import StageB
    from .networks.stage_c import StageC
    from .text.encoder import TextEncoder
    from .text.tokenizer import Tokenizer
    from .vision import ImageEncoder

_HOME = {
    "ControlNet": "networks.controlnet",
    "ImageEncoder": "vision",
    "Previewer": "networks.previewer",
    "SemanticCompressor": "networks.compressor",
    "StageA": "networks.stage_a",
    "StageB": "networks.stage_b",
    "StageC": "networks.stage_c",
    "TextEncoder": "text.encoder",
    "Tokenizer": "text.tokenizer",
    "infer_config": "networks.inference",
    "load_model": "checkpoints",
    "load_published_state_dict": "checkpoints",
}

__all__ = [
    "CascadeError",
    "ControlNet",
    "ImageEncoder",
    "Previewer",
    "SemanticCompressor",
    "StageA",
    "StageB",
    "StageC",
    "TextEncoder",
    "Tokenizer",
    "infer_config",
    "load_model",
    "load_published_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
