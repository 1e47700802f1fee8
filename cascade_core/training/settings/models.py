"""`models`: the networks, by the names that the loaders offer."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import CascadeError

ROLES = {"image_encoder": "vision"}  # the loaders' roles where `models` has other names
DECODERS = {  # published files that decode samples if no network is named; the first one found is used
    "stage_b": tuple(f"stage_b{size}.safetensors" for size in ("_bf16", "", "_lite_bf16", "_lite")),
    "stage_a": ("stage_a.safetensors",),
    "previewer": ("previewer.safetensors",),
}


@dataclass(frozen=True)
class ModelSettings:
    """The networks, by file name.

    Samples are decoded by `stage_b` and `stage_a`, or by `previewer`. If none of these is named, the published files
    are used, as far as they are found.
    """

    # the Stage C that is trained, or for which something is trained
    stage_c: str = "stage_c_bf16.safetensors"
    text_encoder: str = "stable_cascade_text_encoder.safetensors"  # encodes the captions
    compressor: str = "effnet_encoder.safetensors"  # encodes the pictures as latents of Stage C
    stage_b: str | None = None  # decodes samples, together with stage_a
    stage_a: str | None = None  # decodes samples, together with stage_b
    previewer: str | None = None  # decodes samples to small pictures, instead of stage_b and stage_a
    image_encoder: str | None = None  # encodes image prompts; null: image prompts are ignored


def decoders_of(
    names: Mapping[str, str | None], find_model: Callable[[str, str], Path]
) -> dict[str, str | None]:
    """The networks that decode samples: those that are named, or the published ones that are found.

    Raises CascadeError where there is none.
    """
    if any(names[key] for key in DECODERS):
        return {}
    stages = {key: _found(key, find_model) for key in ("stage_b", "stage_a")}
    chosen = stages if all(stages.values()) else {"previewer": _found("previewer", find_model)}
    if not all(chosen.values()):
        raise CascadeError(
            "output.sample_every makes pictures by models.stage_b and models.stage_a, or by models.previewer, and none "
            "is named or found; name them, run `cascade fetch previewer`, or leave it at 0."
        )
    return chosen


def trained_decoder(
    names: Mapping[str, str | None], find_model: Callable[[str, str], Path]
) -> dict[str, str | None]:
    """The Stage B that is trained and its Stage A: those that are named, or the published ones that are found.

    Raises CascadeError where there is none.
    """
    chosen = {key: names[key] or _found(key, find_model) for key in ("stage_b", "stage_a")}
    for key, name in chosen.items():
        if name is None:
            raise CascadeError(
                f"Stage B is trained, but models.{key} is not named, and no published one is found; name it, or run "
                "`cascade fetch`."
            )
    return chosen


def _found(key: str, find_model: Callable[[str, str], Path]) -> str | None:
    for name in DECODERS[key]:
        with suppress(CascadeError):
            find_model(key, name)
            return name
    return None
