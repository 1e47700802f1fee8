"""Model files by role: the folders that ComfyUI keeps them in, and the choice of a folder's file for each network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import locate, parts_in
from .checkpoints.source import read_shapes
from .errors import CascadeError, printable, quoted

# Names are ComfyUI's categories; `SUBFOLDERS` gives their folders. Files are searched for in `stable_cascade` too,
# except embeddings, which ComfyUI itself searches for.
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

SUFFIXES = (".safetensors", ".sft")
# The roles of a whole cascade, by the part that `checkpoints.parts_in` names.
PARTS = {
    "stage_c": "stage_c",
    "stage_b": "stage_b",
    "stage_a": "stage_a",
    "compressor": "compressor",
    "previewer": "previewer",
    "text_encoder": "text",
    "vision": "vision",
}
PREFERENCES = ("full", "lite")


def subfolders(category: str) -> tuple[str, ...]:
    """The folders under `models` that belong to a category."""
    return SUBFOLDERS.get(category, (category,))


def names_in(folder: Path, role: str) -> list[str]:
    """Safetensors files under `folder`, relative to it; for text encoders and whole pipelines also their folders."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, False where access is denied
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
    return has_vocabulary and locate(folder, "text").name.startswith("model.")


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder is a whole pipeline as diffusers saves one."""
    return os.path.isfile(folder / "model_index.json")


# The roles whose value may be a folder, each with the test that recognises one.
FOLDER_TESTS = {"text_encoder": is_encoder_folder, "checkpoint": is_pipeline_folder}


def leaves_folder(name: str) -> bool:
    """Whether a file name could point out of the folder it is looked up in."""
    path = Path(name)
    return not name or path.is_absolute() or ".." in path.parts or bool(path.drive)


def embedding_in(folders: Iterable[Path], name: str) -> Path | None:
    """The embedding of that name, with or without its extension, in the folders or their subfolders."""
    if leaves_folder(name):
        return None
    endings = tuple(f"/{spelling}" for spelling in (name, name.replace("\\", "/")))  # also as on Windows
    for folder in folders:
        for listed in names_in(folder, "embedding"):
            stem, _, _ = listed.rpartition(".")  # the ending in any case
            if f"/{listed}".endswith(endings) or f"/{stem}".endswith(endings):
                return folder / listed
    return None


@dataclass(frozen=True)
class _Candidate:
    """A file or folder that holds a network.  values: number of weights; half: in 16 bits or fewer"""

    path: Path
    values: int
    half: bool


class ModelFiles:
    """The files of one cascade, in a `models` folder like ComfyUI's, any folder of files, or diffusers' folders.

    folder   where to look
    chosen   {role: a path, or a name inside the folder}, for roles whose file is chosen by hand
    prefer   "full": of several networks for a role the largest is taken; "lite": the smallest
    full_precision  True: of one network in several precisions, the float32 file is taken; False: the one in 16 bits

    Ties are broken by name. Files are recognised by their contents, whatever their names; only headers are read.
    """

    def __init__(
        self,
        folder: str | Path,
        chosen: Mapping[str, str | Path] | None = None,
        prefer: str = "full",
        full_precision: bool = False,
    ):
        _check_path("folder", folder)
        self.folder = Path(folder).absolute()  # since the working directory may change before a search
        self.chosen = dict(chosen or {})
        self.prefer, self.full_precision = prefer, full_precision
        unknown = sorted(set(self.chosen) - set(PARTS))
        if unknown:
            names = ", ".join(printable(name) for name in unknown[:3])
            raise CascadeError(f"{names} is not a role; choose among {', '.join(PARTS)}.")
        if not isinstance(prefer, str) or prefer not in PREFERENCES:
            raise CascadeError(f"prefer is {quoted(prefer)}; choose {' or '.join(PREFERENCES)}.")
        if not str(folder) or not os.path.isdir(self.folder):  # unlike Path.is_dir, False for too long a name
            raise CascadeError(
                f"{printable(str(folder)) or 'An empty name'} is not a folder; give the folder that holds the model "
                "files, such as models."
            )
        self._paths: dict[str, Path | None] = {}

    def find(self, role: str) -> Path:
        """The file for a role of PARTS. Raises CascadeError where there is none."""
        path = self.find_optional(role)
        if path is None:
            raise CascadeError(
                f"No {ROLE_WORDS[role]} was found in {self.folder} (looked in it and in its folders "
                f"{', '.join(FOLDERS[role])}); put its file there, or name it: load(…, {role}=path). "
                "`cascade fetch` gets the published ones."
            )
        return path

    def find_optional(self, role: str) -> Path | None:
        """The file for a role, or None."""
        if role not in self._paths:
            if role in self.chosen:
                self._paths[role] = self.named(role, self.chosen[role])
            else:
                self._paths[role] = self._best(role)
        return self._paths[role]

    def named(self, role: str, name: str | Path) -> Path:
        """A file of any role by its name inside the folder, or by its path. Raises CascadeError where there is none."""
        _check_path(ROLE_WORDS[role], name)
        places = [*self._places(role), self.folder]
        for path in (*(place / name for place in places), Path(name)):
            if str(name) and os.path.exists(path):
                return path
        raise CascadeError(
            f"No {ROLE_WORDS[role]} file {quoted(str(name))} was found in {self.folder} (in "
            f"{', '.join(FOLDERS[role])}); put it there, or give its path."
        )

    def embedding(self, name: str) -> Path | None:
        """The file of `embedding:name`, with or without its extension, in the folder's `embeddings` or below."""
        return embedding_in(self._places("embedding"), name)

    def _places(self, role: str) -> list[Path]:
        return [self.folder / subfolder for category in FOLDERS[role] for subfolder in subfolders(category)]

    def _best(self, role: str) -> Path | None:
        candidates = list(self._candidates(role))
        if not candidates:
            return None
        sign = -1 if self.prefer == "full" else 1

        def order(candidate: _Candidate) -> tuple:
            return sign * candidate.values, candidate.half == self.full_precision, str(candidate.path)

        return min(candidates, key=order).path

    def _candidates(self, role: str) -> Iterator[_Candidate]:
        """Files and folders with the role's network: first in the role's folders, then anywhere in the folder."""
        places = [*self._places(role), *self._places("checkpoint")]
        for group in (dict.fromkeys(places), (self.folder,)):
            paths = dict.fromkeys(path for place in group for path in self._paths_in(place, role))
            candidates = [one for path in paths if (one := _candidate(path, PARTS[role])) is not None]
            if candidates:
                yield from candidates
                return

    @staticmethod
    def _paths_in(place: Path, role: str) -> list[Path]:
        pipelines = [place] if is_pipeline_folder(place) else []
        pipelines += [
            place / name for name in names_in(place, "checkpoint") if is_pipeline_folder(place / name)
        ]
        return [*pipelines, *(place / name for name in names_in(place, role))]


def _check_path(name: str, path: str | Path) -> None:
    if not isinstance(path, str | Path):
        raise CascadeError(f"{name} is of type {type(path).__name__}; give a path, as text or a Path.")


def _candidate(path: Path, part: str) -> _Candidate | None:
    """The part's network in a file or folder; None where it holds none or cannot be read."""
    try:
        located = locate(path, part)
        if not located.is_file():
            return None
        tensors = read_shapes(located)
        layout = parts_in(tensors).get(part)
        published = {} if layout is None else layout.to_published(tensors)
    except (CascadeError, OSError):
        return None
    if not published:
        return None
    weights = [tensor for tensor in published.values() if tensor.is_floating_point()]
    sizes = {True: 0, False: 0}
    for tensor in weights:
        sizes[tensor.dtype.itemsize < torch.float32.itemsize] += tensor.numel()
    return _Candidate(path, sum(sizes.values()), sizes[True] >= sizes[False])
