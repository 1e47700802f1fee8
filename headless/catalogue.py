"""Catalogue of the published files: source, folder, how each is recognised, and the workflows that need it.

Paths, names and sizes are those that the file lists of the repositories show on the hub:
https://huggingface.co/stabilityai/stable-cascade/tree/main (commit a89f66d) with its folders `text_encoder`,
`controlnet` and `comfyui_checkpoints`, and https://huggingface.co/openai/clip-vit-large-patch14/tree/main. The
licence is the repository's own file LICENSE, dated November 28, 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..cascade_core.errors import CascadeError
from ..cascade_core.hints.kinds import KINDS, ControlNetKind

GB, MB = 10**9, 10**6


@dataclass(frozen=True)
class Licence:
    """Licence of a file: its terms in a few words, and its address."""

    name: str
    terms: str
    url: str


STABILITY = Licence(
    "Stability AI Non-Commercial Research Community License",
    "for research and other non-commercial use; by using the files you agree to it",
    "https://huggingface.co/stabilityai/stable-cascade/blob/main/LICENSE",
)
OPENAI = Licence(
    "MIT License, under which OpenAI published CLIP",
    "the model card adds limits of its own on what CLIP should be used for",
    "https://github.com/openai/CLIP/blob/main/LICENSE and "
    "https://huggingface.co/openai/clip-vit-large-patch14",
)

WHOLE = ("F32",)
HALF = ("BF16", "F16", "F8_E4M3", "F8_E5M2")  # a conversion to fp16 or fp8 serves like the bf16 file


@dataclass(frozen=True)
class PublishedFile:
    """File on the hub.

    name: its name for `cascade fetch`; path: inside `repo`; folder and saved_as: its place under `models`, and a
    descriptive name there; size: bytes, as rounded by the hub's list; role: of `nodes/hosts/roles.py`, whose folders
    are searched; traits and precisions: part of the configuration read back from a file, and the safetensors dtypes,
    by which the same network is recognised under another name (empty precisions: any); sha256: of the file, where it
    is known: the hub's lists do not show it, and reports of `cascade verify` do.
    """

    name: str
    description: str
    size: int
    path: str
    folder: str
    saved_as: str
    role: str
    traits: Mapping[str, Any] = field(hash=False)
    precisions: tuple[str, ...] = ()
    repo: str = "stabilityai/stable-cascade"
    licence: Licence = STABILITY
    sha256: str | None = None


@dataclass(frozen=True)
class Workflow:
    """Task and its needs: for each, the names of files that meet it, beginning with the one to fetch."""

    name: str
    description: str
    needs: tuple[tuple[str, ...], ...]


_STAGE_C = {"full": {"c_hidden": [2048, 2048]}, "lite": {"c_hidden": [1536, 1536]}}
_STAGE_B = {"full": {"c_hidden": [320, 640, 1280, 1280]}, "lite": {"c_hidden": [320, 576, 1152, 1152]}}


def _stage(name: str, description: str, size: int, traits: Mapping[str, Any]) -> PublishedFile:
    file_name, role = f"{name}.safetensors", name[: len("stage_c")]
    precisions = HALF if name.endswith("_bf16") else WHOLE
    return PublishedFile(
        name, description, size, file_name, "diffusion_models", file_name, role, traits, precisions
    )


def _controlnet(kind: ControlNetKind, description: str, size: int) -> PublishedFile:
    # ComfyUI's own examples put `stable_cascade_` before these names too.
    path, saved_as = f"controlnet/{kind.name}.safetensors", f"stable_cascade_{kind.name}.safetensors"
    traits = {"bottleneck_mode": kind.backbone, "c_in": kind.channels, "c_proj": 2048}
    return PublishedFile(
        f"controlnet_{kind.name}", description, size, path, "controlnet", saved_as, "controlnet", traits
    )


def _all_in_one(stage: str, description: str, size: int) -> PublishedFile:
    saved_as = f"stable_cascade_{stage}.safetensors"
    traits = {"holds": stage, **(_STAGE_C if stage == "stage_c" else _STAGE_B)["full"]}
    return PublishedFile(
        f"comfyui_{stage}",
        description,
        size,
        f"comfyui_checkpoints/{saved_as}",
        "checkpoints",
        saved_as,
        "checkpoint",
        traits,
    )


_FILES = (
    _stage("stage_c", "Stage C, 3.6 B, float32", 14_400 * MB, _STAGE_C["full"]),
    _stage("stage_c_bf16", "Stage C, 3.6 B, bfloat16", 7_180 * MB, _STAGE_C["full"]),
    _stage("stage_c_lite", "Stage C, 1.0 B, float32", 4_120 * MB, _STAGE_C["lite"]),
    _stage("stage_c_lite_bf16", "Stage C, 1.0 B, bfloat16", 2_060 * MB, _STAGE_C["lite"]),
    _stage("stage_b", "Stage B, 1.5 B, float32", 6_250 * MB, _STAGE_B["full"]),
    _stage("stage_b_bf16", "Stage B, 1.5 B, bfloat16", 3_130 * MB, _STAGE_B["full"]),
    _stage("stage_b_lite", "Stage B, 0.7 B, float32", 2_800 * MB, _STAGE_B["lite"]),
    _stage("stage_b_lite_bf16", "Stage B, 0.7 B, bfloat16", 1_400 * MB, _STAGE_B["lite"]),
    PublishedFile(
        "stage_a",
        "Stage A: latents to pixels",
        73_700_000,
        "stage_a.safetensors",
        "vae",
        "stage_a.safetensors",
        "stage_a",
        {"c_hidden": 384, "codebook_size": 8192},
    ),
    PublishedFile(
        "text_encoder",
        "text encoder, CLIP ViT-bigG/14",
        1_390 * MB,
        "text_encoder/model.safetensors",
        "text_encoders",
        "stable_cascade_text_encoder.safetensors",
        "text_encoder",
        {"hidden_size": 1280, "num_hidden_layers": 32},
    ),
    PublishedFile(
        "effnet_encoder",
        "semantic compressor: picture to Stage C's latent",
        81_500_000,
        "effnet_encoder.safetensors",
        "vae",
        "effnet_encoder.safetensors",
        "compressor",
        {"c_latent": 16, "stages": None},  # None: the published widths; others are stated
    ),
    PublishedFile(
        "previewer",
        "previewer: Stage C's latent to a small picture",
        16 * MB,
        "previewer.safetensors",
        "vae",
        "previewer.safetensors",
        "previewer",
        {"c_hidden": 512},
    ),
    PublishedFile(
        "image_encoder",
        "image encoder, CLIP ViT-L/14 (with its text half, which is not loaded)",
        1_710 * MB,
        "model.safetensors",
        "clip_vision",
        "clip_vit_large_patch14.safetensors",
        "vision",
        {"hidden_size": 1024, "projection_dim": 768},
        repo="openai/clip-vit-large-patch14",
        licence=OPENAI,
    ),
    _controlnet(KINDS["canny"], "ControlNet for edges", 218 * MB),
    _controlnet(KINDS["inpainting"], "ControlNet for inpainting", 218 * MB),
    _controlnet(KINDS["super_resolution"], "ControlNet for super resolution", 814 * MB),
    _all_in_one("stage_c", "Stage C with encoders, compressor and previewer in one, for ComfyUI", 9_220 * MB),
    _all_in_one("stage_b", "Stage B with text encoder and Stage A in one, for ComfyUI", 4_550 * MB),
)

_ANY_STAGE_C = ("stage_c_bf16", "stage_c", "stage_c_lite_bf16", "stage_c_lite")
_ANY_STAGE_B = ("stage_b_bf16", "stage_b", "stage_b_lite_bf16", "stage_b_lite")
_LAST = (("stage_a",), ("text_encoder",))
_ANY = (_ANY_STAGE_C, _ANY_STAGE_B, *_LAST)

_WORKFLOWS = (
    Workflow("text_to_image", "text to image, full size, float32", (("stage_c",), ("stage_b",), *_LAST)),
    Workflow(
        "text_to_image_bf16",
        "text to image, full size, 16 bits",
        (_ANY_STAGE_C[:2], _ANY_STAGE_B[:2], *_LAST),
    ),
    Workflow(
        "text_to_image_lite", "text to image, lite, float32", (("stage_c_lite",), ("stage_b_lite",), *_LAST)
    ),
    Workflow(
        "text_to_image_lite_bf16",
        "text to image, lite, 16 bits",
        (_ANY_STAGE_C[2:], _ANY_STAGE_B[2:], *_LAST),
    ),
    Workflow(
        "text_to_image_comfyui",
        "text to image, from ComfyUI's two checkpoints",
        (("comfyui_stage_c",), ("comfyui_stage_b",)),
    ),
    # The default networks of `cascade train`, and those that make a picture with its result.
    Workflow(
        "training",
        "a LoRA trained on pictures of one's own, and tried",
        (("stage_c_bf16",), ("text_encoder",), ("effnet_encoder",), _ANY_STAGE_B, ("stage_a",)),
    ),
    Workflow("image_variation", "pictures like a given one", (*_ANY, ("image_encoder",))),
    Workflow("image_to_image", "a picture as the start", (*_ANY, ("effnet_encoder",))),
    Workflow("edges", "along the edges of a picture", (*_ANY, ("controlnet_canny",))),
    Workflow(
        "inpainting", "part of a picture anew", (*_ANY, ("controlnet_inpainting",), ("effnet_encoder",))
    ),
    # Its hint is the compressor's latent of the small picture.
    Workflow(
        "super_resolution",
        "a small picture made large",
        (*_ANY, ("controlnet_super_resolution",), ("effnet_encoder",)),
    ),
)

FILES: dict[str, PublishedFile] = {file.name: file for file in _FILES}
WORKFLOWS: dict[str, Workflow] = {workflow.name: workflow for workflow in _WORKFLOWS}


def check_name(name: str) -> None:
    """Raises CascadeError, with the nearest names, unless it is a file's or a workflow's."""
    names = [*FILES, *WORKFLOWS]
    if name in names:
        return
    close = get_close_matches(name.lower().removesuffix(".safetensors"), names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "`cascade models` lists what there is."
    raise CascadeError(f"There is no published file or workflow {name!r}; {hint}")


def notice(names: Iterable[str]) -> str:
    """Notice before files are fetched: their source, size and licence."""
    by_repo: dict[tuple[str, Licence], list[PublishedFile]] = {}
    for name in dict.fromkeys(names):
        file = FILES[name]
        by_repo.setdefault((file.repo, file.licence), []).append(file)
    lines = []
    for (repo, licence), files in by_repo.items():
        listed = ", ".join(file.name for file in files)
        lines += [
            f"{listed} ({in_words(sum(file.size for file in files))}) of https://huggingface.co/{repo}",
            f"  licence: {licence.name} ({licence.terms})",
            f"  read it: {licence.url}",
        ]
    return "\n".join(lines)


def in_words(size: int) -> str:
    """Bytes as the hub counts them, in powers of ten: 7.18 GB, 73.7 MB."""
    for unit, word in ((GB, "GB"), (MB, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {word}" if size < 100 * unit else f"{size / unit:.0f} {word}"
    return f"{size} bytes"
