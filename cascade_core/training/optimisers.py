"""Optimisers by name, any other by its class, and the learning rate over time."""

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..errors import CascadeError, quoted
from .settings import TrainSettings


class Source(NamedTuple):
    """Package and class of an optimiser, and the settings that it takes beside the learning rate."""

    module: str
    name: str
    takes: tuple[str, ...] = ("betas", "weight_decay")
    options: Callable[[TrainSettings], dict[str, Any]] = lambda settings: {}

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


SOURCES = {
    # Loshchilov & Hutter 2017, arXiv 1711.05101
    "adamw": Source("torch.optim", "AdamW"),
    # Dettmers et al. 2021, arXiv 2110.02861
    "adamw8bit": Source("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw8bit": Source("bitsandbytes.optim", "PagedAdamW8bit"),
    # Shazeer & Stern 2018, arXiv 1804.04235; with the given rate, as AdamW, instead of a relative one of its own
    "adafactor": Source(
        "transformers.optimization",
        "Adafactor",
        ("weight_decay",),
        lambda settings: {"relative_step": False, "scale_parameter": False},
    ),
    # Chen et al. 2023, arXiv 2302.06675
    "lion": Source("bitsandbytes.optim", "Lion"),
    # Mishchenko & Defazio 2023, arXiv 2306.06101
    "prodigy": Source(
        "prodigyopt", "Prodigy", options=lambda settings: {"safeguard_warmup": bool(warmup_steps(settings))}
    ),
    # Defazio et al. 2024, arXiv 2405.15682; warms up by itself
    "schedulefree": Source(
        "schedulefree",
        "AdamWScheduleFree",
        options=lambda settings: {"warmup_steps": warmup_steps(settings)},
    ),
}


def build_optimiser(groups: Iterable[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """Builds the settings' optimiser. groups: `params`, and optionally `share` of the learning rate (1)."""
    groups = [{"share": 1.0, **group} for group in groups]
    options: dict[str, Any] = {"lr": settings.learning_rate}
    if source := SOURCES.get(settings.optimizer):
        options |= {name: getattr(settings, name) for name in source.takes} | source.options(settings)
    if settings.optimizer == "adamw":
        options["fused"] = any(parameter.is_cuda for group in groups for parameter in group["params"])
    optimiser = optimiser_class(settings)(groups, **options | settings.optimizer_arguments)
    if averages_itself(optimiser):
        optimiser.train()  # pyright: ignore[reportAttributeAccessIssue]
    return optimiser


def optimiser_class(settings: TrainSettings) -> Callable[..., torch.optim.Optimizer]:
    """Raises CascadeError where its package is missing, or where `module.Class` is not an optimiser."""
    name = settings.optimizer
    module, _, class_name = name.rpartition(".")
    source = SOURCES.get(name) or Source(module, class_name)
    try:
        importlib.import_module(source.package)
        found = getattr(importlib.import_module(source.module), source.name, None)
    except ImportError:
        whose = f"{source.package}'" if source.package.endswith("s") else f"{source.package}'s"
        raise CascadeError(
            f"train.optimizer {name} is {whose}, which is not installed; run: pip install {source.package}, or "
            "choose adamw."
        ) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise CascadeError(
            f"train.optimizer is {quoted(name)}, but {quoted(source.name)} of {source.module} is not an optimiser of "
            "torch; give module.Class of one, or a known name such as adamw."
        )
    return found


def averages_itself(optimiser: torch.optim.Optimizer) -> bool:
    """Whether the optimiser is schedule-free: its weights become their average only by `eval()`."""
    return all(callable(getattr(optimiser, mode, None)) for mode in ("train", "eval"))


def warmup_steps(settings: TrainSettings) -> int:
    return _steps(settings.warmup, settings)


def _steps(number: float, settings: TrainSettings) -> int:
    """A setting as a number of steps; a value below 1 is a share of the run's."""
    return round(number * settings.steps) if number < 1 else int(number)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then by the schedule down to `final_learning_rate`, a share of the peak.

    schedulefree has the peak throughout: it warms up by itself.
    """
    warmup = warmup_steps(settings)
    if settings.optimizer == "schedulefree":
        return settings.learning_rate
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    length = max(settings.steps - warmup, 1)
    progress = (step - warmup) / length
    if settings.schedule == "stable_decay":
        decay = min(max(_steps(settings.decay, settings), 1), length)
        progress = max(step - (settings.steps - decay), 0) / decay
    elif settings.restarts and progress < 1:
        progress = progress * (settings.restarts + 1) % 1
    floor = settings.final_learning_rate
    if settings.schedule == "cosine":
        return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return settings.learning_rate * (floor + (1 - floor) * (1 - progress))
