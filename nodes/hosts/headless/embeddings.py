"""Files for `embedding:name` in a prompt, without ComfyUI: in `models/embeddings`, found as ComfyUI does."""

from ....cascade_core.adapters import LearnedToken
from ....cascade_core.adapters.embeddings import embedding_tokens
from ....cascade_core.model_files import embedding_in
from ..reporting import notify
from .folders import search_folders


def embeddings_in(prompt: str, width: int) -> list[LearnedToken]:
    """The tokens of every embedding that a prompt asks for; notifies the user of missing files.

    width: of the text encoder's vectors
    """
    folders = search_folders("embedding")
    places = ", ".join(str(folder) for folder in folders)
    return embedding_tokens(prompt, width, lambda name: embedding_in(folders, name), places, notify)
