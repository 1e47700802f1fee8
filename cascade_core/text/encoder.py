"""CLIP's text encoder: prompts -> the states and the pooled vector that the stages are conditioned on.

Stable Cascade takes the last layer's states before the final layer norm (`hidden_states[-1]`) at all 77
positions, and the pooled vector: the state at the first end token, normed and projected. Within the encoder
no position attends past the first end token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints import in_model_folder, read_named
from ..checkpoints.carried import CONFIG, VOCABULARY, as_tensor
from ..errors import CascadeError
from ..networks.inference import stated_table
from .clip import CLIP_TOKENS, CONFIG_KEYS, Shapes, explain_non_finite, infer_text_config, load_clip, told_by
from .known_words import stated_words
from .learned_tokens import LearnedToken, TokenTable
from .tokenizer import Chunk, Tokenizer
from .vocabulary import bundled_vocabulary, tokenizer_table

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

__all__ = [
    "TextEncoder",
    "TextStates",
    "Tokenizer",
    "build_text_model",
    "encode_tokens",
    "infer_text_config",
]

logger = logging.getLogger(__name__)

CHUNKS_AT_ONCE = 32  # bounds the memory that a very long prompt or a large batch takes


class TextStates(NamedTuple):
    """states: (B, 77·n, C), n the chunks of the longest prompt; pooled: (B, P). Both float32."""

    states: Tensor
    pooled: Tensor


def build_text_model(
    config: Mapping[str, Any], device: str | torch.device | None = None
) -> CLIPTextModelWithProjection:
    """transformers' CLIP text encoder with its projection, freshly initialised; without values on "meta".

    config: `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
    `projection_dim`, `vocab_size`, and optionally `max_position_embeddings` (77), `hidden_act`
    ("quick_gelu"), `layer_norm_eps`, `bos_token_id`, `eos_token_id`, `pad_token_id` (the vocabulary's last
    two). Other keys are ignored.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    end = config["vocab_size"] - 1
    tokens = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    stated = {key: config[key] for key in CONFIG_KEYS["text"] if key in config}
    with torch.device(device or torch.get_default_device()):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(**{"attn_implementation": "sdpa", **tokens, **stated})
        )


def encode_tokens(
    model: CLIPTextModelWithProjection, tokens: Tensor, end_token: int, learned: TokenTable | None = None
) -> TextStates:
    """Runs the encoder on chunks of tokens; differentiable, for training too.  Not thread-safe.

    tokens: (N, T) ids, an end token in every row -> states (N, T, C) before the final norm, pooled (N, P).
    """
    states, at_end = _run_model(model, tokens, end_token, learned)
    return TextStates(states, model.text_projection(at_end))


def _run_model(
    model: CLIPTextModelWithProjection, tokens: Tensor, end_token: int, learned: TokenTable | None
) -> tuple[Tensor, Tensor]:
    """States (N, T, C), and the normed ones at the first end token (N, C), which the projection pools."""
    first_end = (tokens == end_token).int().argmax(dim=-1)  # (N,)
    mask = torch.arange(tokens.shape[1], device=tokens.device) <= first_end.unsqueeze(1)  # (N, T)
    # In CLIP, hidden_states[-1] has always been the input of the final norm, but some versions of transformers return
    # the normed states there for other models; so the norm's input itself is taken.
    before_norm: list[Tensor] = []
    final_norm = model.text_model.final_layer_norm
    hooks = [final_norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))]
    input_ids = tokens
    if learned is not None:
        input_ids, embedding = learned.in_vocabulary(tokens), model.text_model.embeddings.token_embedding
        hooks.append(embedding.register_forward_hook(lambda _, __, embedded: learned.embed(tokens, embedded)))
    try:
        model.text_model(input_ids=input_ids, attention_mask=mask.long())
    finally:
        for hook in hooks:
            hook.remove()
    states = before_norm[0]  # (N, T, C)
    at_end = states[torch.arange(len(states), device=states.device), first_end]  # (N, C)
    return states if learned is None else learned.output(tokens, states), final_norm(at_end)


class _Chunked(NamedTuple):
    """Prompts that are encoded together: their distinct chunks, and where each prompt has which of them."""

    rows: list[tuple[int, ...]]  # tokens of each distinct chunk
    places: Tensor  # (B, n) rows
    weights: Tensor  # (B, n, 77)
    empty_row: int | None  # of the empty prompt, where weights need it


class TextEncoder:
    """Prompts -> TextStates, by a CLIP text model and its tokenizer."""

    def __init__(self, model: CLIPTextModelWithProjection, tokenizer: Tokenizer):
        vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
        count = max(len(tokenizer), *(number + 1 for number in tokenizer.backend.get_vocab().values()))
        if count > vocabulary:
            raise CascadeError(
                f"The tokenizer has {count} tokens but the text encoder embeds {vocabulary}; "
                "use the tokenizer files that came with this text encoder."
            )
        if tokenizer.length > positions:
            raise CascadeError(
                f"The text encoder has {positions} positions; expected at least {tokenizer.length}."
            )
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        notify: Callable[[str], object] = logger.warning,
        placed: bool = False,
    ) -> TextEncoder:
        """Loads a safetensors file or a model folder for inference, in the file's dtype unless one is given.

        placed: placement reads and casts it later, on its way to a device.

        The tokenizer is the folder's: its own, its `tokenizer` subfolder's or its `tokenizer` neighbour's.
        For a single file that embeds CLIP's whole vocabulary it is the bundled one.
        """
        model = load_clip(path, "text", build_text_model, dtype, notify, placed)
        return cls(model, find_tokenizer(Path(path), model.config.vocab_size))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], learned: Sequence[LearnedToken] = ()) -> TextStates:
        """Encodes prompts together, each distinct chunk once, on the model's device.

        learned: tokens outside the vocabulary, and changes of tokens in it.

        A prompt's chunks are joined along the positions. A prompt of fewer chunks than the longest is
        followed by chunks of the empty prompt; its own positions hold the same states as alone. A token's weight w
        scales its state's difference to the empty prompt's at the same position, `empty + w·(state − empty)`. The
        pooled vector is the first chunk's, and weights do not change it.
        """
        return self.encode_each([[prompts] if isinstance(prompts, str) else prompts], learned)[0]

    @torch.no_grad()
    def encode_each(
        self, batches: Sequence[Sequence[str]], learned: Sequence[LearnedToken] = ()
    ) -> list[TextStates]:
        """`encode` of each batch of prompts, in as few passes of the model as hold them together, so that streamed
        weights are read as seldom as possible.
        """
        table = self._table(learned) if learned else None
        chunked = [self._chunked(prompts, table) for prompts in batches]
        encoded = self._encode_rows([batch.rows for batch in chunked], table)
        return [_joined(batch, states) for batch, states in zip(chunked, encoded, strict=True)]

    def _chunked(self, prompts: Sequence[str], table: TokenTable | None) -> _Chunked:
        chunked = [self.tokenizer.chunks(prompt, table and table.ids) for prompt in prompts]
        count = max(len(chunks) for chunks in chunked)
        empty = self.tokenizer.empty_chunk()
        chunked = [chunks + [empty] * (count - len(chunks)) for chunks in chunked]
        weights = torch.tensor([[[weight for _, weight in c] for c in chunks] for chunks in chunked])
        rows: dict[tuple[int, ...], int] = {}  # a distinct chunk's tokens -> its row
        places = torch.tensor(
            [[rows.setdefault(_tokens(c), len(rows)) for c in chunks] for chunks in chunked]
        )
        weighted = bool((weights != 1).any())
        empty_row = rows.setdefault(_tokens(empty), len(rows)) if weighted else None
        return _Chunked(list(rows), places, weights, empty_row)

    def _table(self, learned: Sequence[LearnedToken]) -> TokenTable:
        config = self.model.config
        return TokenTable(learned, config.vocab_size, config.hidden_size)

    def _encode_rows(
        self, batches: list[list[tuple[int, ...]]], learned: TokenTable | None
    ) -> list[TextStates]:
        """The rows of each batch, pooled by a product of its own, which rounds as it does without the others."""
        # Of the first weights, the tokens' embeddings, placement may look up the rows in main memory.
        pool, sizes = self.model.text_projection, list(map(len, batches))
        device = pool.weight.device
        together = torch.tensor([row for rows in batches for row in rows], device=device)
        ran = [
            _run_model(self.model, part, self.tokenizer.end_token, learned)
            for part in together.split(CHUNKS_AT_ONCE)
        ]
        states, at_end = (torch.cat(parts).split(sizes) for parts in zip(*ran, strict=True))
        encoded = [
            TextStates(own.float(), torch.cat([pool(part) for part in ends.split(CHUNKS_AT_ONCE)]).float())
            for own, ends in zip(states, at_end, strict=True)
        ]
        for batch in encoded:
            explain_non_finite(self.model, batch.states, "text encoder")
        return encoded


def _joined(batch: _Chunked, encoded: TextStates) -> TextStates:
    """The states of each prompt, its chunks side by side and weighted.  encoded: (R, 77, C), (R, P)"""
    states = encoded.states[batch.places]  # (B, n, 77, C)
    if batch.empty_row is not None:
        weights = batch.weights.to(states.device).unsqueeze(-1)  # (B, n, 77, 1)
        around = encoded.states[batch.empty_row]  # (77, C)
        states = torch.where(weights == 1, states, around + weights * (states - around))
    return TextStates(states.flatten(1, 2), encoded.pooled[batch.places[:, 0]])


def _tokens(chunk: Chunk) -> tuple[int, ...]:
    return tuple(token for token, _ in chunk)


def find_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer stored in a text encoder's file or in the files beside it, else CLIP's own.

    Raises CascadeError where none of them has this number of tokens.
    """
    metadata = read_named(path, "text").metadata
    tokenizer = _tokenizer(path, vocab_size, metadata)
    tokenizer.words = stated_words(metadata)
    return tokenizer


def _tokenizer(path: Path, vocab_size: int, metadata: Mapping[str, str]) -> Tokenizer:
    if table := stated_table(metadata, VOCABULARY):
        return Tokenizer.from_vocabulary(*tokenizer_table(table, path))
    folder = path if path.is_dir() else path.parent
    if in_model_folder(path) or vocab_size < CLIP_TOKENS:
        beside = ("tokenizer", "prior_tokenizer")  # in a pipeline's folder: this one or its parent
        for place in (folder, *(root / name for root in (folder, folder.parent) for name in beside)):
            if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file():
                return Tokenizer.from_folder(place)
    if vocab_size >= CLIP_TOKENS:
        return Tokenizer.bundled()
    raise CascadeError(
        f"The text encoder {path} embeds {vocab_size} tokens, not CLIP's {CLIP_TOKENS}, and no tokenizer "
        "lies beside it; put its vocab.json and merges.txt there."
    )


def carried_by(config: Mapping[str, Any], shapes: Shapes, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Tensors that state a text encoder's configuration and vocabulary, where its weights do not determine them."""
    tensors = {}
    if not told_by(shapes, config, "text"):
        tensors[CONFIG] = as_tensor(config)
    if tokenizer.backend.get_vocab() != bundled_vocabulary()[0]:
        tensors[VOCABULARY] = as_tensor(tokenizer.table())
    return tensors
