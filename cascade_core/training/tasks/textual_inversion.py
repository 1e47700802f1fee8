"""Learned tokens (textual inversion, Gal et al. 2022, arXiv 2208.01618), through a frozen text encoder and Stage C."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import Adapter, LearnedToken, read_adapter, write_adapter
from ...adapters.tokens import name_in_prompt
from ...errors import CascadeError, counted
from ...networks.stage_c import StageC
from ...text.encoder import TextEncoder
from ...text.learned_tokens import TokenTable
from ..cuda_graphs import GraphedFunction
from ..settings import ObjectiveSettings, TokenSettings
from .base import State
from .conditions import CachedText
from .stage_c import StageCInputs, StageCTask
from .trainable_text import TrainableText


class LearnedTokens(nn.Module):
    """The rows of all tokens, one after the other.  vectors: (V, C) float32"""

    def __init__(self, tokens: Sequence[TokenSettings], encoder: TextEncoder, captions: Sequence[str]):
        super().__init__()
        check_names(tokens, captions)
        self.counts = {name_in_prompt(token.name): token.vectors for token in tokens}
        config = encoder.model.config
        self.first, self.width = config.vocab_size, config.hidden_size
        self.vectors = nn.Parameter(torch.cat([first_vectors(encoder, token) for token in tokens]))
        self._override: Tensor | None = None

    def tokens(self, vectors: Tensor) -> tuple[LearnedToken, ...]:
        """Tokens as in a file, of vectors (V, C)."""
        parts = vectors.split(list(self.counts.values()))
        return tuple(LearnedToken(name, part) for name, part in zip(self.counts, parts, strict=True))

    def table(self) -> TokenTable:
        """The learned tokens with their present vectors, for the text encoder."""
        vectors = self.vectors if self._override is None else self._override
        return TokenTable(self.tokens(vectors), self.first, self.width)

    def trainable_text(self, encoder: TextEncoder, captions: Sequence[str]) -> TrainableText:
        return TrainableText(encoder, captions, self.table().ids, self.table)

    @contextmanager
    def replaced(self, vectors: Tensor) -> Iterator[None]:
        """Uses other vectors for the tokens inside the block, such as their average."""
        self._override = vectors
        try:
            yield
        finally:
            self._override = None

    def group(self, share: float = 1.0) -> dict[str, Any]:
        # weight decay would pull the vectors to zero, far from all words
        return {"params": [self.vectors], "share": share, "weight_decay": 0.0}


class TokensTask(StageCTask):
    """Tokens' vectors in float32, of a frozen text encoder in float32 and a frozen Stage C in `dtype`."""

    trained: LearnedTokens

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
        """encoder: on its device; captions: those of the data, by id."""
        super().__init__(stage_c, text, objective, dtype)
        self.trained = LearnedTokens(tokens, encoder, captions).to(self.device)
        self.trainable_text = self.trained.trainable_text(encoder, captions)
        self.frozen: Callable[..., Tensor] = stage_c

    @property
    def described(self) -> str:
        names = self.trained.counts
        return f"{counted(len(names), 'learned token')} ({', '.join(names)})"

    def use_cuda_graphs(self) -> None:
        self.frozen = GraphedFunction(self.frozen)

    def groups(self) -> list[dict[str, Any]]:
        return [self.trained.group()]

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        conditions = self.conditions_of(inputs)
        return self.diffusion_loss(lambda x, r: self.frozen(x.to(self.dtype), r, *conditions), inputs)

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        with self.trained.replaced(state["vectors"]), torch.no_grad():
            yield self.stage_c

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        tokens = self.trained.tokens(state["vectors"].detach().float().cpu())
        write_adapter(path, Adapter(path.name, "comfyui", tokens=tokens), "comfyui", metadata=metadata)


def check_names(tokens: Sequence[TokenSettings], captions: Sequence[str]) -> None:
    """Raises CascadeError for a token that no caption contains, and for two tokens with the same name."""
    names = [name_in_prompt(token.name) for token in tokens]
    for i, name in enumerate(names):
        if name.lower() in (before.lower() for before in names[:i]):
            raise CascadeError(f"tokens holds {name} twice; give each token a name of its own.")
        if not any(name.lower() in caption.lower() for caption in captions):
            raise CascadeError(
                f"No caption holds {name}, so nothing would be learned; write it into the captions as you will into "
                "prompts."
            )


def first_vectors(encoder: TextEncoder, token: TokenSettings) -> Tensor:
    """Initial values (vectors, C) of a token: those of the file that it goes on from, or `initial_vectors`."""
    if token.start is None:
        return initial_vectors(encoder, token)
    learned = read_adapter(token.start).tokens
    named = [each for each in learned if each.name.lower() == name_in_prompt(token.name).lower()]
    chosen = named or (learned if len(learned) == 1 else ())
    if not chosen:
        names = ", ".join(each.name for each in learned) or "none"
        raise CascadeError(
            f"tokens.start: {token.start} holds the tokens {names}; give the token the name of one of them."
        )
    vectors, width = chosen[0].vectors, encoder.model.config.hidden_size
    if vectors.shape != (token.vectors, width):
        raise CascadeError(
            f"tokens.start: {token.start} has {counted(len(vectors), 'vector')} of {vectors.shape[-1]} for "
            f"{chosen[0].name}, but vectors is {token.vectors} and the text encoder's have {width}; give vectors: "
            f"{len(vectors)}, or another file."
        )
    return vectors.float()


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
