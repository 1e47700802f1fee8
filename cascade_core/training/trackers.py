"""A run's numbers and samples for TensorBoard and Weights & Biases, through accelerate's trackers.

The log in the run's folder remains authoritative: a resumed run drops the lines after its last checkpoint there,
while trackers keep the numbers that they received.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CascadeError

FOLDER = "trackers"  # inside the run's folder


def check_trackers(names: Sequence[str]) -> None:
    """Raises CascadeError where a tracker's package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise CascadeError(
                f"output.log_with names {name}, which is not installed; run: pip install {name}, or leave it out."
            )


class Trackers:
    """The trackers of a run, started with the first number. settings: as JSON."""

    def __init__(self, names: Sequence[str], folder: Path, settings: str):
        self.names, self.folder, self.settings = names, folder, settings
        self._started: list[Any] | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers():
            tracker.log(dict(values), step=step)

    def log_picture(self, picture: Tensor, step: int) -> None:
        """picture: (3, H, W) in [0, 1]"""
        pixels = (picture * 255).round().byte().movedim(0, -1).numpy()
        for name, tracker in zip(self.names, self._trackers(), strict=True):
            layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
            tracker.log_images({"samples": pixels[None]}, step=step, **layout)

    def close(self) -> None:
        for tracker in self._started or ():
            tracker.finish()
        self._started = None

    def _trackers(self) -> list[Any]:
        if self._started is None:
            self._started = [self._start(name) for name in self.names]
        return self._started

    def _start(self, name: str) -> Any:
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        folder = self.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            tracker: Any = TensorBoardTracker("tensorboard", logging_dir=str(folder))
        else:  # nothing leaves the machine unless its user asks for it
            mode: Any = os.environ.get("WANDB_MODE", "offline")
            tracker = WandBTracker("stable-cascade", dir=str(folder), name=self.folder.name, mode=mode)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(_flat(json.loads(self.settings)))
        return tracker


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain values by `section.key`, as trackers require."""
    flat: dict[str, Any] = {}
    for section, values in settings.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            plain = value if isinstance(value, int | float | str | bool) else json.dumps(value)
            flat[f"{section}.{key}" if key else section] = plain
    return flat
