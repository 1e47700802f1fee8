"""Stable Cascade in pure PyTorch. `StableCascade` is the front door; behind it lie the networks, their checkpoints,
diffusion and sampling, text and vision.

Names are imported when they are first used, so that a command line that only wants `CascadeError` starts without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CascadeError, Interrupted

if TYPE_CHECKING:
    from .arguments import StageSettings
    from .checkpoints import load_model, load_published_state_dict
    from .making import StageProgress
    from .networks.compressor import SemanticCompressor
    from .networks.controlnet import ControlNet
    from .networks.inference import infer_config
    from .networks.previewer import Previewer
    from .networks.stage_a import StageA
    from .networks.stage_b import StageB
    from .networks.stage_c import StageC
    from .pipeline import StableCascade
    from .stages.hint import Control
    from .text.encoder import TextEncoder
    from .text.tokenizer import Tokenizer
    from .vision import ImageEncoder

_HOME = {
    "Control": "stages.hint",
    "ControlNet": "networks.controlnet",
    "ImageEncoder": "vision",
    "Previewer": "networks.previewer",
    "StageProgress": "making",
    "SemanticCompressor": "networks.compressor",
    "StableCascade": "pipeline",
    "StageA": "networks.stage_a",
    "StageB": "networks.stage_b",
    "StageC": "networks.stage_c",
    "StageSettings": "arguments",
    "TextEncoder": "text.encoder",
    "Tokenizer": "text.tokenizer",
    "infer_config": "networks.inference",
    "load_model": "checkpoints",
    "load_published_state_dict": "checkpoints",
}

__all__ = [
    "CascadeError",
    "Control",
    "ControlNet",
    "ImageEncoder",
    "Interrupted",
    "Previewer",
    "SemanticCompressor",
    "StableCascade",
    "StageA",
    "StageB",
    "StageC",
    "StageProgress",
    "StageSettings",
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
