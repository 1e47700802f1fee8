# pyright: reportMissingImports=false
"""LoRAs and learned tokens in ComfyUI: its own weight patches, on clones of its MODEL and CLIP, ours or native."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import comfy.weight_adapter
import torch
from torch import Tensor, nn

from ....cascade_core.adapters import Adapter, Change, LowRank
from ....cascade_core.adapters.about import trigger_words
from ....cascade_core.adapters.apply import changed_weight
from ....cascade_core.adapters.names import parameter_name
from ....cascade_core.adapters.tokens import NewToken, taught_tokens
from ....cascade_core.errors import CascadeError
from ....cascade_core.networks.config import StageBConfig, StageCConfig
from ....cascade_core.networks.inference import infer_config
from .model import HostedNetwork
from .tokens import with_learned, with_words

NETWORK, TEXT = "diffusion_model.", "clip_g.transformer."  # prefixes of the layers' names
EMBEDDING = f"{TEXT}text_model.embeddings.token_embedding.weight"


class ChangeAdapter(comfy.weight_adapter.WeightAdapterBase):
    """Adapter for any change of ours other than a plain LoRA. weights: (the change's class, the values of its fields)

    The core computes the change, so DoRA uses the row norms of W + ΔW, as in the paper and in PEFT; the host's own
    DoRA uses those of W.
    """

    name = "cascade_change"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]):
        self.loaded_keys = loaded_keys
        self.weights = weights  # the host rebuilds this with its tensors moved

    def calculate_weight(self, weight, key, strength, *arguments, **options):
        kind, *values = self.weights
        return weight.copy_(changed_weight(weight, kind(*values), strength))


class RowsAdapter(comfy.weight_adapter.WeightAdapterBase):
    """Adds rows to an embedding matrix. weights: (tokens (n,), rows (n, C))"""

    name = "cascade_rows"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(self, weight, key, strength, *arguments, **options):
        tokens, rows = (tensor.to(weight.device) for tensor in self.weights)
        return weight.index_add_(0, tokens, (strength * rows).to(weight.dtype))


def stage_config(model: Any) -> StageCConfig | StageBConfig:
    network = model.model.diffusion_model
    if isinstance(network, HostedNetwork):
        return network.network.config
    kind, config = infer_config(network.state_dict())
    return (StageBConfig if kind == "stage_b" else StageCConfig).from_dict(config)


def text_network(clip: Any) -> nn.Module:
    encoder = getattr(getattr(clip, "cond_stage_model", None), "clip_g", None)
    if encoder is None:
        class_name = type(getattr(clip, "cond_stage_model", clip)).__name__
        raise CascadeError(
            f"The CLIP is a {class_name}, not Stable Cascade's; connect Load Cascade Text Encoder."
        )
    return encoder.transformer


def with_adapter(
    model: Any,
    clip: Any,
    adapter: Adapter,
    strength_model: float,
    strength_clip: float,
    new_tokens: Sequence[NewToken],
) -> tuple[Any, Any]:
    if strength_model and adapter.diffusion:
        model = model.clone()
        model.add_patches(weight_patches(adapter.diffusion, NETWORK), strength_model)
    if clip is not None and strength_clip:
        clip = with_text(clip, adapter, strength_clip, new_tokens)
    return model, clip


def with_text(clip: Any, adapter: Adapter, strength: float, new_tokens: Sequence[NewToken]) -> Any:
    clip = clip.clone()
    clip.add_patches(weight_patches(adapter.text, TEXT), strength)
    vocabulary = clip.tokenizer.clip_g.tokenizer.get_vocab()
    taught = taught_tokens(adapter, strength, vocabulary, unpatched(clip, EMBEDDING), new_tokens)
    changes = [token for token in taught if token.index is not None]
    if changes:
        rows = (
            torch.tensor([token.index for token in changes]),
            torch.cat([token.vectors for token in changes]),
        )
        clip.add_patches({EMBEDDING: RowsAdapter(set(), rows)})
    learned_tokens = [token for token in taught if token.index is None]
    if any(token.output for token in learned_tokens):
        raise CascadeError(
            f"{adapter.name} teaches tokens at the text encoder's output, which ComfyUI's text encoders do not offer; "
            "set strength_clip to 0 to use the rest of it."
        )
    clip.tokenizer = with_words(clip.tokenizer, trigger_words(adapter.metadata))
    if learned_tokens:
        clip.tokenizer = with_learned(clip.tokenizer, {token.name: token.vectors for token in learned_tokens})
    return clip


def weight_patches(changes: Mapping[str, Change], prefix: str) -> dict[str, Any]:
    """Maps names of the host's parameters to their adapters."""
    return {f"{prefix}{parameter_name(target)}": weight_adapter(change) for target, change in changes.items()}


def weight_adapter(change: Change) -> Any:
    """Wraps a change as one of the host's weight adapters; a LoRA's has (up, down, alpha, mid, magnitude, reshape)."""
    if isinstance(change, LowRank) and change.magnitude is None:
        weights = (change.up, change.down, change.alpha, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), weights)
    values = [getattr(change, field.name) for field in fields(change)]  # pyright: ignore[reportArgumentType]
    return ChangeAdapter(set(), (type(change), *values))


def unpatched(value: Any, key: str) -> Tensor:
    """A weight as loaded, without patches."""
    weight, _ = value.patcher.get_key_patches(key.removesuffix(".weight"))[key][0]
    return weight
