"""Presets by the memory of a card: defaults for settings that a file leaves open, `preset: 12gb` or `auto`.

They change how a run fits into memory, not what it learns: a step always has four pictures. Whole networks are an
exception, since on a small card only their last blocks can be trained. `checks.py` counts whether these fit.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import CascadeError, quoted

PresetName = Literal["8gb", "12gb", "16gb", "24gb", "48gb"]
Values = Mapping[str, Mapping[str, Any]]
SPARE = 0.7  # GiB that a card may have less than its nominal memory
CONTEXT_BYTES = 0.6 * 2**30  # taken on a card by CUDA and its kernels outside of PyTorch's memory

_SMALL: Values = {
    "train": {"batch_size": 1, "accumulate": 4, "base_weights": "int8", "optimizer": "adamw8bit"}
}
_HALVES: Values = {"train": {"batch_size": 2, "accumulate": 2, "base_weights": "int8"}}
_ROOMY: Values = {"train": {"gradient_checkpointing": False}}
_WHOLE = {
    "optimizer": "adamw8bit",
    "ema": 0.0,
    "batch_size": 1,
    "accumulate": 4,
}  # 10 bytes per trained weight, 2 per frozen one

WHOLE_TEXT = "finetune_text"  # key of PRESETS for a finetune of the text encoder


def _blocks(first: float, **data: Any) -> Values:
    return {"train": _WHOLE, "finetune": {"depth": [first, 1.0]}, "data": data}


def _text(base_weights: str, **data: Any) -> Values:
    return {"train": {**_WHOLE, "base_weights": base_weights}, "data": data}  # those of Stage C


# By task; settings that are missing here keep their defaults.
_FROZEN: dict[str, Values] = {"8gb": {**_SMALL, "data": {"size": 768}}, "12gb": _HALVES, "48gb": _ROOMY}
PRESETS: dict[str, dict[str, Values]] = {
    "lora": _FROZEN,
    "tokens": _FROZEN,
    "controlnet": {
        "8gb": {**_SMALL, "data": {"size": 768}},
        "12gb": _SMALL,
        "16gb": _HALVES,
        "48gb": _ROOMY,
    },
    "finetune": {
        "8gb": _blocks(0.99, size=768),
        "12gb": _blocks(0.93),
        "16gb": _blocks(0.85),
        "24gb": _blocks(0.7),
        "48gb": {"train": _WHOLE},
    },
    WHOLE_TEXT: {
        "8gb": _text("nf4", size=768),
        "12gb": _text("nf4"),
        "16gb": _text("int8"),
        "24gb": _text("full"),
        "48gb": _text("full"),
    },
}
NAMES = get_args(PresetName)


def with_preset(values: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The values of a settings file, with its preset's values for settings that it leaves open. Raises CascadeError."""
    if values.get("preset") is None:
        return dict(values)
    finetune = values.get("finetune")
    text = isinstance(finetune, Mapping) and finetune.get("network") == "text_encoder"
    name, defaults = preset_values(values["preset"], WHOLE_TEXT if text else task)
    merged = {**values, "preset": name}
    for section, more in defaults.items():
        own = values.get(section) or {}
        if not isinstance(own, Mapping):  # a mistake; reported where the section is read
            continue
        if section == "finetune" and "modules" in own:
            continue
        merged[section] = {**more, **own}
    return merged


def preset_values(name: Any, task: str) -> tuple[str, Values]:
    """A preset's name (for `auto`, that for this card) and its values by section.

    Raises CascadeError for a preset that does not exist, or where `auto` finds no card.
    """
    if name == "auto":
        name = preset_of_card()
    if name not in NAMES:
        raise CascadeError(f"preset is {quoted(name)}; known: auto, {', '.join(NAMES)}.")
    return name, PRESETS[task].get(name, {})


def preset_of_card() -> str:
    """The preset for the memory of the first card. Raises CascadeError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise CascadeError("preset auto asks what memory the card has, but there is none; leave it out.")
    return preset_for(torch.cuda.get_device_properties(0).total_memory)


def free_bytes(preset: str) -> float:
    """What a card of a preset leaves to PyTorch, or this machine's card if it is larger."""
    import torch

    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return max(int(preset.removesuffix("gb")) * 2**30, here) - CONTEXT_BYTES


def preset_for(total_bytes: int) -> str:
    """The largest preset for a card with this much memory; the smallest preset for smaller cards."""
    size = total_bytes / 2**30 + SPARE
    return next((name for name in reversed(NAMES) if int(name.removesuffix("gb")) <= size), NAMES[0])
