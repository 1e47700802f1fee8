"""Which weight of a MODEL, CLIP, VAE or CLIP_VISION is at fault."""

from ....cascade_core.stages.weights import Stage, non_finite_weight


def first_non_finite(value: Stage) -> str | None:
    return non_finite_weight(value)
