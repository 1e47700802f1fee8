"""Finds the weight of a MODEL, CLIP, VAE or CLIP_VISION that holds NaN or infinity."""

from ....cascade_core.stages.weights import Stage, non_finite_weight


def first_non_finite(value: Stage) -> str | None:
    return non_finite_weight(value)
