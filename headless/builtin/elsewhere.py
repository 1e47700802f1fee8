"""Sentences about options of ComfyUI's nodes that do not run here, and where they do."""

from __future__ import annotations

from collections.abc import Sequence

from ...cascade_core.errors import quoted

ELSEWHERE = "run with --server, on a ComfyUI"


def only(name: str, value: str | None, choices: Sequence[str]) -> str | None:
    """Why a value of ComfyUI's does not run here; None if it does, or if it comes over a link."""
    if value is None or value in choices:
        return None
    listed = " and ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    return f"{name} is {quoted(value)}, but only {listed} {'run' if len(choices) > 1 else 'runs'} here; {ELSEWHERE}."
