# pyright: reportMissingImports=false
"""Learned tokens in ComfyUI's own tokenizer.

ComfyUI has embeddings, files that a prompt names by `embedding:`. Learned vectors are written as such files into a
temporary folder of the tokenizer, and their names in prompts are replaced by such words, so that the host handles
weights, chunks and other embeddings.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from ....cascade_core.adapters.embeddings import PREFIX
from ....cascade_core.checkpoints import write_safetensors
from ....cascade_core.text.tokenizer import learned_names

KEY = "clip_g"


class LearnedTokenizer:
    """Tokenizer, of the host's class or like it, that replaces names by embeddings.

    vectors: {name: (V, C)}; base: the tokenizer without them, which is not changed
    """

    def __init__(self, base: Any, vectors: Mapping[str, Tensor]):
        self.base = base
        self.vectors = dict(vectors)
        self.folder = tempfile.TemporaryDirectory(prefix="cascade_", ignore_cleanup_errors=True)
        self.files = {name: f"cascade_{uuid4().hex}" for name in vectors}
        for name, rows in vectors.items():
            write_safetensors(Path(self.folder.name) / f"{self.files[name]}.safetensors", {KEY: rows}, {})
        self.pattern = learned_names(vectors)
        self.inner = copy.copy(base)
        folders = base.embedding_directory or []
        self.inner.embedding_directory = [
            self.folder.name,
            *([folders] if isinstance(folders, str) else folders),
        ]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Any:
        """Calls the host's method with the names replaced."""
        text = self.pattern.sub(lambda match: self._word(match[0]), text)
        return self.inner.tokenize_with_weights(text, return_word_ids, **options)

    def _word(self, name: str) -> str:
        """The host's word for a name in upper or lower case; a text equal only by Unicode folding is unchanged."""
        files = {known.lower(): file for known, file in self.files.items()}
        return f" {PREFIX}{files[name.lower()]} " if name.lower() in files else name

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while it is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)


def with_words(tokenizer: Any, words: Sequence[str]) -> Any:
    """Adds words that a LoRA teaches to a CLIP's tokenizer, if the tokenizer lists the words that it knows."""
    chunker = getattr(tokenizer, KEY)
    base, vectors = (
        (chunker.base, chunker.vectors) if isinstance(chunker, LearnedTokenizer) else (chunker, {})
    )
    if not words or not getattr(base, "words", ()):
        return tokenizer
    base = copy.copy(base)
    base.words = (*base.words, *words)
    tokenizer = copy.copy(tokenizer)
    setattr(tokenizer, KEY, LearnedTokenizer(base, vectors) if vectors else base)
    return tokenizer


def with_learned(tokenizer: Any, vectors: Mapping[str, Tensor]) -> Any:
    """Adds learned names to a CLIP's tokenizer; later vectors replace earlier ones of the same name."""
    base = getattr(tokenizer, KEY)
    if isinstance(base, LearnedTokenizer):
        base, vectors = base.base, {**base.vectors, **vectors}
    tokenizer = copy.copy(tokenizer)
    setattr(tokenizer, KEY, LearnedTokenizer(base, vectors))
    return tokenizer
