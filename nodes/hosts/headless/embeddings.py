"""What `embedding:name` in a prompt stands for without ComfyUI: files in `models/embeddings`, found as ComfyUI does."""

from pathlib import Path

from ....cascade_core.adapters import LearnedToken
from ....cascade_core.adapters.embeddings import PREFIX, embedding_names, read_embedding
from ....cascade_core.errors import CascadeError
from .. import roles
from .folders import search_folders


def embeddings_in(prompt: str, width: int) -> list[LearnedToken]:
    """The tokens of every embedding that a prompt asks for. width: of the text encoder's own."""
    tokens = []
    for written in embedding_names(prompt):
        # As in ComfyUI, a comma at the end of a name may belong to the name or to the sentence.
        names = dict.fromkeys((written, written.strip(",")))
        found = next(((name, path) for name in names if (path := _find(name)) is not None), None)
        if found is None:
            folders = ", ".join(str(folder) for folder in search_folders("embedding"))
            raise CascadeError(
                f"The prompt asks for {PREFIX}{written}, but no such safetensors file is in {folders}; put it there, "
                "or take it out of the prompt."
            )
        name, path = found
        tokens.append(LearnedToken(PREFIX + name, read_embedding(path, width)))
    return tokens


def _find(name: str) -> Path | None:
    """The file of that name, with or without its ending, in the folders of embeddings or in folders within."""
    if roles.leaves_folder(name):
        return None
    endings = tuple(f"/{name}{suffix}" for suffix in ("", *roles.SUFFIXES))
    for folder in search_folders("embedding"):
        for listed in roles.names_in(folder, "embedding"):
            if f"/{listed}".endswith(endings):
                return folder / listed
    return None
