"""CLIP's encoders for training: the same outputs without synchronisation, from layers that can be compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_nodes.cascade_core.text.encoder import TextStates
from cascade_nodes.cascade_core.text.learned_tokens import TokenTable
from cascade_nodes.cascade_core.vision import CLIP_MEAN, CLIP_STD

Layer = Callable[[Any, Tensor, Tensor | None], Tensor]


def encoder_layer(layer: Any, x: Tensor, seen: Tensor | None) -> Tensor:
    """Runs one of CLIP's layers.  x: (N, T, C); seen: (N, 1, T, T), mask of attended positions; None: all"""
    attention = layer.self_attn
    h = layer.layer_norm1(x)
    q, k, v = (
        projection(h).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (N, heads, T, C / heads)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layer_norm2(x))


def text_states(
    model: Any,
    tokens: Tensor,
    end_token: int,
    layer: Layer = encoder_layer,
    learned: TokenTable | None = None,
) -> TextStates:
    """Encodes tokens as `encode_tokens` does: states (N, T, C) before the final norm, and pooled (N, P).

    tokens: (N, T) ids, an end token in every row; learned: tokens at the encoder's input

    transformers reads the mask's values on the CPU, which cannot be captured in a CUDA graph.
    """
    text = model.text_model
    end = (tokens == end_token).int().argmax(dim=-1)  # (N,)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    seen = (place[:, None] >= place) & (place <= end[:, None])[:, None]  # (N, T, T)
    embeddings = text.embeddings
    if learned is None:
        x = embeddings.token_embedding(tokens)
    else:
        x = learned.embed(tokens, embeddings.token_embedding(learned.in_vocabulary(tokens)))
    x = x + embeddings.position_embedding.weight[: tokens.shape[1]]
    for block in text.encoder.layers:
        x = layer(block, x, seen[:, None])
    at_end = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]  # (N, C)
    return TextStates(x, model.text_projection(text.final_layer_norm(at_end)))


def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) of pixels in [0, 1], by which CLIP's units are defined."""
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return mean, std


def image_embeddings(model: Any, pixels: Tensor, layer: Layer = encoder_layer) -> Tensor:
    """Encodes pictures as `ImageEncoder` does.  pixels: (B, 3, size, size) in CLIP's units -> (B, E), projected"""
    vision = model.vision_model
    x = vision.pre_layrnorm(vision.embeddings(pixels))  # (B, 1 + patches, C)
    for block in vision.encoder.layers:
        x = layer(block, x, None)
    return model.visual_projection(vision.post_layernorm(x[:, 0]))
