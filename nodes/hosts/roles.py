"""Which files a loader offers: ComfyUI's folders for each role, our own, and the bundled demo cascade."""

import os
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
DEMO_FOLDER = PACK / "demo" / "weights"

# Names are ComfyUI's categories; `SUBFOLDERS` gives their folders. All but embeddings, which ComfyUI itself looks for,
# are looked for in `stable_cascade` too.
FOLDERS: dict[str, tuple[str, ...]] = {
    "stage_c": ("diffusion_models", "checkpoints", "stable_cascade"),
    "stage_b": ("diffusion_models", "checkpoints", "stable_cascade"),
    "stage_a": ("vae", "stable_cascade"),
    "compressor": ("vae", "stable_cascade"),
    "previewer": ("vae", "stable_cascade"),
    "text_encoder": ("text_encoders", "stable_cascade"),
    "vision": ("clip_vision", "stable_cascade"),
    "controlnet": ("controlnet", "stable_cascade"),
    "lora": ("loras", "stable_cascade"),
    "embedding": ("embeddings",),
    "checkpoint": ("checkpoints", "diffusers", "stable_cascade"),
    "face": ("insightface", "stable_cascade"),
}

SUBFOLDERS: dict[str, tuple[str, ...]] = {
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
}

DEMO_NAMES: dict[str, str] = {
    "stage_c": "demo_stage_c.safetensors",
    "stage_b": "demo_stage_b.safetensors",
    "stage_a": "demo_stage_a.safetensors",
    "compressor": "demo_compressor.safetensors",
    "previewer": "demo_previewer.safetensors",
    "text_encoder": "demo_text_encoder",
    "vision": "demo_image_encoder.safetensors",
}

# Of these roles the demo has any number of files; learned tokens are loaded as LoRAs are.
DEMO_SETS: dict[str, tuple[str, ...]] = {
    "controlnet": ("demo_controlnet_*.safetensors",),
    "lora": ("demo_lora_*.safetensors", "demo_token_*.safetensors"),
}

ROLE_WORDS: dict[str, str] = {
    "stage_c": "Stage C",
    "stage_b": "Stage B",
    "stage_a": "Stage A",
    "compressor": "semantic compressor",
    "previewer": "previewer",
    "text_encoder": "text encoder",
    "vision": "image encoder",
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "embedding": "embedding",
    "checkpoint": "checkpoint",
    "face": "InsightFace",
}

DTYPES = ("auto", "bf16", "fp16", "fp32", "fp8")
SUFFIXES = (".safetensors", ".sft")


def subfolders(category: str) -> tuple[str, ...]:
    """The folders under `models` that belong to a category."""
    return SUBFOLDERS.get(category, (category,))


def names_in(folder: Path, role: str) -> list[str]:
    """Safetensors files under `folder`, relative to it; of text encoders also their folders."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for one that must not be looked into
        return []
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and os.path.isfile(path)]
    names = {path.relative_to(folder).as_posix() for path in files}
    if role == "text_encoder":
        names |= {
            path.parent.relative_to(folder).as_posix() for path in files if is_encoder_folder(path.parent)
        }
    if role == "checkpoint":
        names |= {path.parent.relative_to(folder).as_posix() for path in folder.rglob("model_index.json")}
    names.discard(".")
    return sorted(names)


def is_encoder_folder(folder: Path) -> bool:
    """Whether a folder holds a text encoder as Hugging Face saves one: weights beside its vocabulary."""
    has_vocabulary = any(os.path.isfile(folder / name) for name in ("vocab.json", "tokenizer.json"))
    return has_vocabulary and os.path.isfile(folder / "model.safetensors")


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder is a whole pipeline as diffusers saves one."""
    return os.path.isfile(folder / "model_index.json")


# The roles whose value may be a folder, and how one is known.
FOLDER_TESTS = {"text_encoder": is_encoder_folder, "checkpoint": is_pipeline_folder}


def leaves_folder(name: str) -> bool:
    """Whether a file name could point out of the folder it is looked up in."""
    path = Path(name)
    return not name or path.is_absolute() or ".." in path.parts or bool(path.drive)


def demo_file(role: str) -> Path | None:
    """The demo cascade's file for a role, where the weights are there."""
    path = DEMO_FOLDER / DEMO_NAMES[role] if role in DEMO_NAMES else None
    return path if path is not None and path.exists() else None


def demo_names(role: str) -> list[str]:
    """The demo cascade's files for a role, those that are there."""
    if role in DEMO_SETS:
        return sorted(path.name for pattern in DEMO_SETS[role] for path in DEMO_FOLDER.glob(pattern))
    return [DEMO_NAMES[role]] if demo_file(role) else []
