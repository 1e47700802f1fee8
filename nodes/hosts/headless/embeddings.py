"""What `embedding:name` in a prompt stands for without ComfyUI: files in `models/embeddings`, found as ComfyUI does."""

from ....cascade_core.adapters import LearnedToken
from ....cascade_core.adapters.embeddings import embedding_tokens
from ....cascade_core.model_files import embedding_in
from ..reporting import notify
from .folders import search_folders


def embeddings_in(prompt: str, width: int) -> list[LearnedToken]:
    """The tokens of every embedding that a prompt asks for; the user is told of one that is missing.

    width: of the text encoder's own
    """
    folders = search_folders("embedding")
    places = ", ".join(str(folder) for folder in folders)
    return embedding_tokens(prompt, width, lambda name: embedding_in(folders, name), places, notify)
