"""Learned tokens (textual inversion, Gal et al. 2022, arXiv 2208.01618), through a frozen text encoder and Stage C."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LearnedToken, write_adapter
from ..adapters.tokens import TokenTable, name_in_prompt
from ..errors import CascadeError
from ..stage_c import StageC
from ..text import TextEncoder
from .conditions import CachedText
from .live_text import LiveText
from .settings import ObjectiveSettings, TokenSettings
from .task import Inputs, State, Task


class LearnedVectors(nn.Module):
    """The rows of all tokens, one after the other.  vectors: (V, C) float32"""

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class TokensTask(Task):
    """Nothing but the vectors changes; the text encoder is in float32, Stage C in `dtype`."""

    def __init__(
        self,
        stage_c: StageC,
        text: CachedText,
        tokens: Sequence[TokenSettings],
        objective: ObjectiveSettings,
        dtype: torch.dtype,
        encoder: TextEncoder,
        captions: Sequence[str],
    ):
        """encoder: on its device; captions: those of the data, by place."""
        super().__init__(stage_c, text, objective, dtype)
        self.encoder = encoder
        self.counts = {name_in_prompt(token.name): token.vectors for token in tokens}
        check_names(self.counts, captions)
        rows = torch.cat([initial_vectors(encoder, token) for token in tokens])
        self.trained = LearnedVectors(rows).to(self.device)
        self._held: Tensor | None = None
        self.live = LiveText(encoder, captions, self._table().ids, self._table)

    def _table(self) -> TokenTable:
        config = self.encoder.model.config
        vectors = self.trained.get_parameter("vectors") if self._held is None else self._held
        return TokenTable(self._tokens(vectors), config.vocab_size, config.hidden_size)

    def _tokens(self, vectors: Tensor) -> list[LearnedToken]:
        parts = vectors.split(list(self.counts.values()))
        return [LearnedToken(name, part) for name, part in zip(self.counts, parts, strict=True)]

    def groups(self) -> list[dict[str, Any]]:
        # weight decay would draw the vectors to zero, which is no word's place
        return [{"params": list(self.trained.parameters()), "weight_decay": 0.0}]

    def loss(self, inputs: Inputs) -> dict[str, Tensor]:
        conditions = self.conditions(self.text_of(inputs))
        return self.diffusion_loss(
            lambda x, r: self.stage_c(x.to(self.dtype), r, *conditions), inputs.latents
        )

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        self._held = state["vectors"]
        try:
            with torch.no_grad():
                yield self.stage_c
        finally:
            self._held = None

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        tokens = tuple(self._tokens(state["vectors"].detach().float().cpu()))
        write_adapter(path, Adapter(path.name, "comfyui", tokens=tokens), "comfyui", metadata=metadata)


def check_names(counts: Mapping[str, int], captions: Sequence[str]) -> None:
    """Raises CascadeError for a token that no caption has. counts: vectors by name in prompts."""
    for name, count in counts.items():
        if count < 1:
            raise CascadeError(f"The token {name} has {count} vectors; give at least one.")
        if not any(name.lower() in caption.lower() for caption in captions):
            raise CascadeError(
                f"No caption holds {name}, so nothing would be learned; write it into the captions as you will into "
                "prompts."
            )


def initial_vectors(encoder: TextEncoder, token: TokenSettings) -> Tensor:
    """(vectors, C): the initial words' own, in turn; their mean for one vector; the vocabulary's mean for no word."""
    embedding = encoder.model.text_model.embeddings.token_embedding
    weight = embedding.get_parameter("weight").detach().float()
    ids = encoder.tokenizer.tokens(token.initial)
    if not ids:
        return weight.mean(0, keepdim=True).repeat(token.vectors, 1)
    if token.vectors == 1:
        return weight[ids].mean(0, keepdim=True)
    return torch.stack([weight[ids[i % len(ids)]] for i in range(token.vectors)])
