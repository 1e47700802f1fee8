# pyright: reportMissingImports=false
"""Progress and live previews in ComfyUI."""

from collections.abc import Callable
from typing import Any

import latent_preview


def step_callback(patcher: Any, steps: int) -> Callable[..., None]:
    """Called as (step, x0, x, steps) after each step: moves the node's bar, shows a preview of x0."""
    return latent_preview.prepare_callback(patcher, steps)
