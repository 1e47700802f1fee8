"""Prompts and picture prompts, encoded by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LearnedToken
from ..adapters.about import trigger_words
from ..adapters.apply import Patch
from ..adapters.tokens import NewToken, taught_tokens
from ..errors import CascadeError
from ..networks import activations
from ..networks.precision import compute_dtype
from ..text.foreign_syntax import describe_syntax
from ..text.known_words import describe_unknown_words
from ..text.prompt_weights import LONGEST_PROMPT
from .device import ComputeDevice
from .weights import naming_non_finite

if TYPE_CHECKING:
    from ..text.encoder import TextEncoder
    from ..vision import ImageEncoder
    from .control import AppliedControlNet


class PicturePrompt(NamedTuple):
    """Pictures beside the words.  embeds: (N, E), each of which is added, or (B, N, E), a row for each image"""

    embeds: Tensor
    strength: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """The conditions of the stages.

    states       (1 or B, T, C), the text encoder's states; for Stage C
    pooled       (1 or B, P), its pooled vector
    pictures     picture prompts; for Stage C
    controlnets  ControlNets with their hints; for Stage C
    effnet       (1 or B, 16, h, w), Stage C's latent; for Stage B
    """

    states: Tensor
    pooled: Tensor
    pictures: tuple[PicturePrompt, ...] = ()
    controlnets: tuple[AppliedControlNet, ...] = ()
    effnet: Tensor | None = None

    def image_tokens(self, width: int) -> Tensor:
        """Picture embeddings, each times its strength, side by side: (1 or B, N, width); zeros without any."""
        if not self.pictures:
            return torch.zeros(1, 1, width)
        rows = [
            (embeds[None] if embeds.ndim == 2 else embeds) * strength for embeds, strength in self.pictures
        ]
        return torch.cat(rows, dim=1)


@dataclass(frozen=True)
class TextStage:
    """A text encoder with its tokenizer. Changes by LoRAs are kept beside the encoder, which others share."""

    encoder: TextEncoder
    file: str
    device: ComputeDevice
    patches: tuple[Patch, ...] = ()
    learned: tuple[LearnedToken, ...] = ()
    taught_words: tuple[str, ...] = ()  # stated by LoRAs as what they teach

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.encoder.model, self.file)]

    @torch.inference_mode()
    def encode(
        self,
        prompts: Sequence[str],
        embeddings: Callable[[str, int], Sequence[LearnedToken]] = lambda prompt, width: (),
    ) -> Prompt:
        """Encodes prompts together; the result is on the CPU in float32.

        embeddings(prompt, width) gives the tokens of files that a prompt asks for by `embedding:name`.
        """
        return self.encode_each([prompts], embeddings)[0]

    @torch.inference_mode()
    def encode_each(
        self,
        batches: Sequence[Sequence[str]],
        embeddings: Callable[[str, int], Sequence[LearnedToken]] = lambda prompt, width: (),
    ) -> list[Prompt]:
        """`encode` of each batch, in one run of the encoder."""
        model = self.encoder.model
        files = {
            token.name: token
            for prompts in batches
            for prompt in prompts
            for token in embeddings(prompt, model.config.hidden_size)
        }
        for notice in filter(None, dict.fromkeys(describe_syntax(p) for prompts in batches for p in prompts)):
            self.device.observer.notify(notice)
        learned = [*self.learned, *files.values()]
        if words := self.encoder.tokenizer.words:
            names = [token.name for token in learned]
            for prompts in batches:
                if notice := describe_unknown_words(prompts, (*words, *self.taught_words), names):
                    self.device.observer.notify(notice)
        chunks = [len(self.encoder.tokenizer.chunks(prompt)) for prompts in batches for prompt in prompts]
        rows = sum(chunks) + len(batches)  # and for each batch the empty one that weights need
        values = activations.clip_encoder(model.config, rows, self.encoder.tokenizer.length)

        def encode(_: torch.device) -> list[Prompt]:
            encoded = self.encoder.encode_each(batches, learned)
            return [Prompt(states.cpu(), pooled.cpu()) for states, pooled in encoded]

        with naming_non_finite(self):
            return self.device.run(
                model, encode, values * compute_dtype(model).itemsize, self.patches, single_use=True
            )

    def with_adapter(self, adapter: Adapter, strength: float, new_tokens: Sequence[NewToken] = ()) -> Self:
        """The encoder with another LoRA or learned tokens, already checked to fit (`adapters.text_changes`)."""
        network: Any = self.encoder.model
        vocabulary = self.encoder.tokenizer.backend.get_vocab()
        embedding = network.get_input_embeddings().weight.to(compute_dtype(network))
        taught = taught_tokens(adapter, strength, vocabulary, embedding, new_tokens)
        patch = Patch(adapter.name, adapter.text, strength)
        return replace(
            self,
            patches=(*self.patches, patch),
            learned=(*self.learned, *taught),
            taught_words=(*self.taught_words, *trigger_words(adapter.metadata)),
        )


@dataclass(frozen=True)
class VisionStage:
    """An image encoder."""

    encoder: ImageEncoder
    file: str
    device: ComputeDevice

    def networks(self) -> list[tuple[nn.Module, str]]:
        """The network with the name of its file."""
        return [(self.encoder.model, self.file)]

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, E) float32 on the CPU."""
        from ..vision import IMAGES_AT_ONCE

        model, batch = self.encoder.model, min(len(pictures), IMAGES_AT_ONCE)
        positions = (model.config.image_size // model.config.patch_size) ** 2 + 1
        workspace = activations.clip_encoder(model.config, batch, positions) * compute_dtype(model).itemsize
        # The pictures in float32, and once more while they are resized.
        workspace += 8 * pictures[:batch].numel()
        with naming_non_finite(self):
            return self.device.run(
                model, lambda _: self.encoder.encode(pictures).cpu(), workspace, single_use=True
            )


def load_text_encoder(path: Path, device: ComputeDevice) -> TextStage:
    """A text encoder from a file or a folder."""
    from ..text.encoder import TextEncoder  # transformers takes seconds to import

    return TextStage(
        TextEncoder.load(path, device.encoder_dtype(), device.observer.notify, device.places),
        path.name,
        device,
    )


def load_image_encoder(path: Path, device: ComputeDevice) -> VisionStage:
    """An image encoder from a file or a folder."""
    from ..vision import ImageEncoder  # transformers takes seconds to import

    return VisionStage(
        ImageEncoder.load(path, device.encoder_dtype(), device.observer.notify, device.places),
        path.name,
        device,
    )


def check_text(name: str, text: str) -> None:
    """Raises CascadeError for a value that is not text, for lone surrogates, as from bytes that are not UTF-8, and
    for more than LONGEST_PROMPT characters: every 75 tokens cost a forward of the text encoder, and lengthen Stage
    C's attention.

    name: of the input
    """
    if not isinstance(text, str):
        raise CascadeError(f"{name} is of type {type(text).__name__}; give text.")
    if len(text) > LONGEST_PROMPT:
        raise CascadeError(f"{name} has {len(text):,} characters; give at most {LONGEST_PROMPT:,}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CascadeError(
            f"{name} holds {text[error.start]!r}, which is not a character; write the prompt in UTF-8."
        ) from None
