"""Embedding files, which a prompt requests by `embedding:name`, as in ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import read_safetensors
from ..checkpoints.files import FLOATING
from ..errors import CascadeError, printable
from ..text.prompt_weights import parse_weights
from ..text.tokenizer import EMBEDDING_NAME
from .adapter import LearnedToken

PREFIX = "embedding:"
LEFT_OUT = "its name is left out of the prompt"
MOST_NAMES = 100  # in one prompt; each is searched for


def embedding_names(prompt: str) -> list[str]:
    """The names that a prompt asks for by `embedding:name` or `embedding: name`, each once, as ComfyUI reads them.

    Raises CascadeError for more than MOST_NAMES, for no name (ComfyUI fails at it), and for a prompt that cannot be
    read.
    """
    runs = [run for text, _ in parse_weights(prompt) for run in re.split(EMBEDDING_NAME, text)]
    names: dict[str, None] = {}
    for run in runs:
        if run.startswith(PREFIX):
            words = run.removeprefix(PREFIX).split(maxsplit=1)
            if not words:
                raise CascadeError(
                    f"The prompt has {PREFIX} without a name; write one after it, or take it out."
                )
            names[re.split(r"[<\[]", words[0])[0]] = None
    names.pop("", None)
    if len(names) > MOST_NAMES:
        raise CascadeError(f"The prompt asks for {len(names)} embeddings, but at most {MOST_NAMES} are read.")
    return list(names)


def spellings(name: str) -> list[str]:
    """A name as written, and without commas around it, which may be the sentence's own, as in ComfyUI."""
    return list(dict.fromkeys((name, name.strip(","))))


def missing(name: str, places: str) -> str:
    """The beginning of a message about a missing embedding."""
    return f"The prompt asks for {PREFIX}{printable(name.strip(','), 80)}, but no such file is in {places}"


def embedding_tokens(
    prompt: str,
    width: int,
    find: Callable[[str], Path | None],
    places: str,
    notify: Callable[[str], None] | None = None,
) -> list[LearnedToken]:
    """The tokens of every embedding that a prompt asks for.

    width: of the text encoder's vectors; find(name): its file or None; places: the searched folders, for the message;
    notify: is told of a file that is missing, whose name is then left out of the prompt, as in ComfyUI.
    Raises CascadeError where a file is not an embedding, and, without `notify`, where it is missing.
    """
    tokens = []
    for written in embedding_names(prompt):
        names = spellings(written)
        name, path = next(((name, path) for name in names if (path := find(name)) is not None), ("", None))
        if path is None:
            if notify is None:
                raise CascadeError(f"{missing(written, places)}; put it there, or take it out of the prompt.")
            notify(f"{missing(written, places)}; {LEFT_OUT}.")
            tokens.append(LearnedToken(PREFIX + names[-1], torch.zeros(0, width)))
            continue
        tokens.append(LearnedToken(PREFIX + name, read_embedding(path, width)))
    return tokens


# Names of the vectors in a file, of which the first present one counts: ComfyUI's and OneTrainer's own, those bundled
# with a LoRA, Automatic1111's.
EMBEDDING_KEYS = (
    r"clip_g",
    r"bundle_emb\..*\.string_to_param\.\*",
    r"bundle_emb\..*\.clip_g",
    r"string_to_param(\.\*)?",
    r"emb_params",
)


def read_embedding(path: Path, width: int) -> Tensor:
    """The vectors (V, C) of an embedding's file. Raises CascadeError for another file, or another width."""
    tensors, _ = read_safetensors(path)
    rows = next((rows for key in EMBEDDING_KEYS if (rows := _matching(tensors, key))), None)
    if rows is None and len(tensors) == 1:
        rows = list(tensors.values())
    if rows is None or not all(
        tensor.ndim in (1, 2) and tensor.numel() and tensor.dtype in FLOATING for tensor in rows
    ):
        first = printable(next(iter(tensors), "none"))
        raise CascadeError(
            f"{path.name} holds {len(tensors)} tensors (first: {first}), but an embedding is "
            "expected, such as clip_g or emb_params; choose one, or load a LoRA with Cascade LoRA Apply."
        )
    columns = next((tensor.shape[-1] for tensor in rows if tensor.shape[-1] != width), width)
    if columns != width:
        raise CascadeError(
            f"{path.name} holds vectors {columns} wide, but the text encoder's are {width}; choose an embedding that "
            "was trained with this text encoder."
        )
    vectors = torch.cat([tensor.float().reshape(-1, width) for tensor in rows])
    if not torch.isfinite(vectors).all():
        raise CascadeError(f"{path.name} holds NaN or infinity; download it again.")
    return vectors


def _matching(tensors: Mapping[str, Tensor], pattern: str) -> list[Tensor]:
    return [tensor for key, tensor in tensors.items() if re.fullmatch(pattern, key)]
