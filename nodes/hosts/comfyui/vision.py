# pyright: reportMissingImports=false
"""CLIP_VISION in ComfyUI: its own image encoder class, built with a file's configuration."""

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
from torch import Tensor

from ....cascade_core.checkpoints.carried import CONFIG, as_tensor
from ....cascade_core.errors import CascadeError
from ....cascade_core.text.clip import CONFIG_KEYS, told_by
from ....cascade_core.vision import middle_square
from .clip import set_norm_eps
from .progress import notify
from .weights import remember_file


class Vision(comfy.clip_vision.ClipVisionModel):
    """Host's image encoder, saved with its configuration where tensors do not determine it.  config: the file's"""

    config: dict[str, Any]

    def get_sd(self) -> dict[str, Tensor]:
        tensors = dict(super().get_sd())
        if not told_by({name: tuple(t.shape) for name, t in tensors.items()}, self.config, "vision"):
            tensors[CONFIG] = as_tensor({key: self.config[key] for key in CONFIG_KEYS["vision"]})
        return tensors


def load_vision(path: Path) -> Vision:
    from ....cascade_core.vision import ImageEncoder

    core = ImageEncoder.load(path, notify=notify)
    config = {**core.model.config.to_dict(), "model_type": "clip_vision_model"}
    with tempfile.TemporaryDirectory() as folder:  # the host takes its configuration from a file
        config_path = Path(folder) / "config.json"
        config_path.write_text(json.dumps(config, default=str), encoding="utf-8")
        vision = Vision(str(config_path))
    vision.config = config
    set_norm_eps(vision.model, config)
    missing_keys, _ = vision.load_sd(core.model.state_dict())
    if missing_keys:
        raise CascadeError(
            f"{path.name} lacks {missing_keys[0]}; choose a CLIP image encoder with its projection."
        )
    remember_file(vision, path.name)
    return vision


def encode_image(vision: Any, image: Tensor) -> Any:
    """Encodes with the host's own encoder, but resizes pictures here: the host rounds the longer side after resizing,
    where CLIP's authors truncate it.
    """
    # CLIP's own encoders, which always see a square.
    if getattr(vision, "model_type", "clip_vision_model") == "clip_vision_model":
        image = middle_square(image.to(vision.load_device), vision.image_size)
    return vision.encode_image(image)
