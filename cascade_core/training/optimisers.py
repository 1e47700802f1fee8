"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), plain or with 8-bit state, and its learning rate over time."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import CascadeError
from .settings import TrainSettings


def build_optimiser(groups: Iterable[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """Build AdamW. groups: `params`, and optionally `share` of the learning rate (1) and other options of AdamW."""
    groups = [{"share": 1.0, **group} for group in groups]
    options = {
        "lr": settings.learning_rate,
        "betas": tuple(settings.betas),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        options["fused"] = any(parameter.is_cuda for group in groups for parameter in group["params"])
    return optimiser_class(settings)(groups, **options)


def optimiser_class(settings: TrainSettings) -> type[torch.optim.Optimizer]:
    """Raises CascadeError where its package is missing."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CascadeError(
            "train.optimizer adamw8bit is bitsandbytes', which is not installed; run: pip install bitsandbytes, or "
            "choose adamw."
        ) from None
    return AdamW8bit


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then constant, or half a cosine down to `final_learning_rate`, a share of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
