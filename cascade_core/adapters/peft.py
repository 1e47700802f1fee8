"""The scale of a PEFT LoRA, which stands in a file beside its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from ..checkpoints import read_json
from ..errors import CascadeError, quoted
from .patterns import texts

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
LARGEST_ALPHA = 1e6

AlphaOf = Callable[[str, int], float | None]  # a layer by the file's name of it, its rank -> alpha


def stated_alpha(path: Path) -> AlphaOf | None:
    """Reads the alphas of the LoRA at `path` from PEFT's adapter_config.json; None if there is none beside it.

    rsLoRA (arXiv 2312.03732) divides alpha by the root of the rank.
    """
    beside = path.with_name(CONFIG_FILE)
    return _alpha_of(beside) if path.name == WEIGHTS_FILE and beside.exists() else None


def _alpha_of(path: Path) -> AlphaOf:
    config = read_json(path)
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    root = config.get("use_rslora") or False
    if not (_is_alpha(alpha) and isinstance(patterns, dict) and isinstance(root, bool)):
        raise CascadeError(
            f"{path} is not a PEFT configuration with a lora_alpha above 0, by which the LoRA beside it is scaled "
            f"(lora_alpha {quoted(alpha)}, use_rslora {quoted(root)}); download it again."
        )
    everywhere, named = float(alpha), _by_name(patterns, path)

    def alpha_of(layer: str, rank: int) -> float:
        name = layer.removeprefix("base_model.model.")
        parts = name.split(".")
        endings = [f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))]
        _, alpha_here = min((named[ending] for ending in endings if ending in named), default=(0, everywhere))
        return alpha_here * math.sqrt(rank) if root else alpha_here

    return alpha_of


def _by_name(patterns: dict[str, Any], path: Path) -> dict[str, tuple[int, float]]:
    """{a name's last parts, or ^ and the whole name: (the pattern's number, its alpha)}; the first pattern counts.

    PEFT runs them as regular expressions, `(.*\\.)?(pattern)$`; here they are names.
    """
    named: dict[str, tuple[int, float]] = {}
    for number, (pattern, alpha) in enumerate(patterns.items()):
        names = texts(pattern, plain=".")
        if names is None or not _is_alpha(alpha):
            raise CascadeError(
                f"{path} states the alpha {quoted(alpha)} for {quoted(pattern)} in alpha_pattern, but numbers above 0 "
                "for layers' names are expected, with | between several; write the names in place of a regular "
                "expression, which is not run."
            )
        for name in names:
            named.setdefault(f"{'^' * name.at_start}{name.text}", (number, alpha))
    return named


def _is_alpha(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 < value <= LARGEST_ALPHA  # which NaN is not
