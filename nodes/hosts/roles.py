"""Files that a loader offers: from ComfyUI's folders for each role, our own, and the bundled demo cascade."""

from pathlib import Path

from ...cascade_core.errors import CascadeError
from ...cascade_core.model_files import (
    FOLDER_TESTS,
    FOLDERS,
    ROLE_WORDS,
    SUFFIXES,
    is_encoder_folder,
    is_pipeline_folder,
    leaves_folder,
    names_in,
    subfolders,
)
from ...cascade_core.stages.device import DTYPES

__all__ = [
    "DEMO_FOLDER",
    "DEMO_NAMES",
    "DEMO_SETS",
    "DTYPES",
    "FOLDERS",
    "FOLDER_TESTS",
    "PACK",
    "ROLE_WORDS",
    "SUFFIXES",
    "check_retired",
    "demo_file",
    "demo_names",
    "is_encoder_folder",
    "is_pipeline_folder",
    "leaves_folder",
    "names_in",
    "spellings",
    "subfolders",
]

PACK = Path(__file__).resolve().parents[2]
DEMO_FOLDER = PACK / "demo" / "weights"

DEMO_NAMES: dict[str, str] = {
    "stage_c": "demo_stage_c.safetensors",
    "stage_b": "demo_stage_b.safetensors",
    "stage_a": "demo_stage_a.safetensors",
    "compressor": "demo_compressor.safetensors",
    "previewer": "demo_previewer.safetensors",
    "text_encoder": "demo_text_encoder",
    "vision": "demo_image_encoder.safetensors",
}

# The demo may have several files for these roles; learned tokens are loaded by the LoRA loader.
DEMO_SETS: dict[str, tuple[str, ...]] = {
    "controlnet": ("demo_controlnet_*.safetensors",),
    "lora": ("demo_lora_*.safetensors", "demo_token_*.safetensors"),
}

# Files that the demo had once, and what a graph that still names them should do.
RETIRED = {
    "demo_lora_two_pictures.safetensors": (
        "The demo's Stage C takes two image prompts by itself, so demo_lora_two_pictures.safetensors is no longer "
        "needed; take it out of the graph."
    ),
}


def demo_file(role: str) -> Path | None:
    """The demo cascade's file for a role, if the weights are present, else None."""
    path = DEMO_FOLDER / DEMO_NAMES[role] if role in DEMO_NAMES else None
    return path if path is not None and path.exists() else None


def demo_names(role: str) -> list[str]:
    """Names of the demo cascade's existing files for a role."""
    if role in DEMO_SETS:
        return sorted(path.name for pattern in DEMO_SETS[role] for path in DEMO_FOLDER.glob(pattern))
    return [DEMO_NAMES[role]] if demo_file(role) else []


def check_retired(name: str) -> None:
    """Raises CascadeError for a file that the demo no longer has."""
    if name in RETIRED:
        raise CascadeError(RETIRED[name])


def spellings(name: str) -> list[str]:
    """A file's name as written, and with `/` in place of backslashes, for graphs saved on Windows."""
    return list(dict.fromkeys((name, name.replace("\\", "/"))))
