"""Result of a run, and the observer that watches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SavedPicture:
    """Picture that a run saved, and the seconds from the start of the run until it was written."""

    path: Path
    node_id: str
    seconds: float


@dataclass
class Result:
    """Result of a run.

    outputs      {node id: ui dictionary} of the output nodes, as ComfyUI's history has them
    timings      {node id: seconds} of the nodes that were executed, not of those whose outputs were reused
    pictures     the pictures saved, in order
    seconds      the whole run
    node_errors  ComfyUI's `node_errors` for outputs that could not be executed while others could
    """

    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    pictures: list[SavedPicture] = field(default_factory=list)
    seconds: float = 0.0
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)


class Observer:
    """Observer of a run. All methods are optional."""

    def seed_drawn(self, seed: int) -> None:
        """Called before the run with the number in place of each seed that is `random`."""

    def node_started(self, index: int, total: int, name: str) -> None:
        """Called when node `index` (from 1) of `total` begins; `name` is like `3 (CascadePriorSampler)`."""

    def node_step(self, step: int, total: int, preview: Any) -> None:
        """Called when the node is at `step` of `total`; `preview` is an (H, W, 3) image in [0, 1], or None."""

    def node_notified(self, text: str) -> None:
        """Called with a node's message for the user."""

    def node_finished(self, seconds: float) -> None:
        """Called when the node that began last is done."""

    def node_reused(self, index: int, total: int, name: str) -> None:
        """Called for node `index`, whose outputs are cached, so that it is not executed."""

    def picture_saved(self, picture: SavedPicture) -> None:
        """Called when a picture was saved, even if others fail later."""

    def status(self, text: str) -> None:
        """Called when the state of a wait changed."""

    def interrupted(self) -> bool:
        """Whether the run should stop; called at every step of a sampler."""
        return False

    def close(self) -> None:
        """Called when the run has ended, with success or not."""
