"""Settings by the memory of a card, as defaults beneath what a file says: `preset: 12gb`, or `auto`.

They change how a run fits, not what it learns: the pictures of a step stay four. Whole networks are an exception, of
which a small card holds the last blocks alone.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import CascadeError, quoted
from .typed_yaml import unknown_name

PresetName = Literal["8gb", "12gb", "16gb", "24gb", "48gb"]
Values = Mapping[str, Mapping[str, Any]]
SPARE = 0.7  # GiB by which a card may have less than its name says

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
}  # 10 bytes a trained weight, 2 others


def _blocks(first: float, **data: Any) -> Values:
    return {"train": _WHOLE, "finetune": {"depth": [first, 1.0]}, "data": data}


# By task; what is missing is as without a preset.
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
        "8gb": _blocks(0.97, size=768),
        "12gb": _blocks(0.93),
        "16gb": _blocks(0.85),
        "24gb": _blocks(0.7),
        "48gb": {"train": _WHOLE},
    },
}
NAMES = get_args(PresetName)


def with_preset(values: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The values of a settings file with those of its preset where it says nothing itself. Raises CascadeError."""
    if values.get("preset") is None:
        return dict(values)
    name, defaults = preset_values(values["preset"], task)
    merged = {**values, "preset": name}
    for section, more in defaults.items():
        own = values.get(section) or {}
        if not isinstance(own, Mapping):  # a mistake, which is named where it is read
            continue
        if section == "finetune" and (own.get("network") == "text_encoder" or "modules" in own):
            continue
        merged[section] = {**more, **own}
    return merged


def preset_values(name: Any, task: str) -> tuple[str, Values]:
    """A preset's name, of this card for `auto`, and its values by section.

    Raises CascadeError for a preset that does not exist, or where `auto` finds no card.
    """
    if name == "auto":
        name = preset_of_card()
    if name not in NAMES:
        raise CascadeError(unknown_name(f"preset is {quoted(name)}", str(name)[:40], ("auto", *NAMES)))
    return name, PRESETS[task].get(name, {})


def preset_of_card() -> str:
    """The preset for the memory of the first card. Raises CascadeError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise CascadeError("preset auto asks what memory the card has, but there is none; leave it out.")
    return preset_for(torch.cuda.get_device_properties(0).total_memory)


def preset_for(total_bytes: int) -> str:
    """The largest preset that a card of so much memory is named after; the smallest for smaller cards."""
    size = total_bytes / 2**30 + SPARE
    return next((name for name in reversed(NAMES) if int(name.removesuffix("gb")) <= size), NAMES[0])
