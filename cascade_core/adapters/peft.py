"""The scale of a PEFT LoRA, which stands in a file beside its tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import CascadeError

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

AlphaOf = Callable[[str, int], float | None]  # a layer by the file's name of it, its rank -> alpha


def stated_alpha(path: Path) -> AlphaOf | None:
    """Reads the alphas of the LoRA at `path` from PEFT's adapter_config.json; None if there is none beside it.

    rsLoRA (arXiv 2312.03732) divides alpha by the root of the rank.
    """
    beside = path.with_name(CONFIG_FILE)
    return _alpha_of(beside) if path.name == WEIGHTS_FILE and beside.is_file() else None


def _alpha_of(path: Path) -> AlphaOf:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        alpha, patterns = float(config["lora_alpha"]), dict(config.get("alpha_pattern") or {})
        patterns = {str(pattern): float(value) for pattern, value in patterns.items()}
        root = bool(config.get("use_rslora"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CascadeError(
            f"{path} is no PEFT configuration with a lora_alpha, by which the LoRA beside it is scaled; download it "
            "again."
        ) from None

    def alpha_of(layer: str, rank: int) -> float:
        name = layer.removeprefix("base_model.model.")
        alpha_here = next((value for pattern, value in patterns.items() if _ends_with(pattern, name)), alpha)
        return alpha_here * math.sqrt(rank) if root else alpha_here

    return alpha_of


def _ends_with(pattern: str, name: str) -> bool:
    """PEFT's patterns are regular expressions of a name's last parts."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error:
        return False
