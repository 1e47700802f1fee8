"""Trains the demo's text and image encoder: `clip` both together, then `layout` and `vision` one each.

Runs of `python -m cascade_nodes.demo.train`.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, save_vocabulary
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.demo import recipe
from cascade_nodes.demo.captions import known_words
from cascade_nodes.demo.captured_loss import Loss
from cascade_nodes.demo.clip_states import encoder_layer, image_embeddings, pixel_statistics, text_states
from cascade_nodes.demo.dataset import as_float, contrasts, pictures, resized, shrunk, wide
from cascade_nodes.demo.detail import EmbeddingDecoder
from cascade_nodes.demo.drawing import ordinary_scenes
from cascade_nodes.demo.job import Draw, Job, Weights, own_tokenizer, own_vocabulary
from cascade_nodes.demo.layout import (
    CellReader,
    Cells,
    Layout,
    LayoutReader,
    cells_loss,
    cells_of,
    layout_loss,
    layout_of,
    place_error,
)
from cascade_nodes.demo.losses import contrastive_loss, outline_weights, share_right, weighted_mse
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.wide_pictures import wide_scenes
from cascade_nodes.demo.world import pack

RELATIONS = "relations"  # in the logs: share of captions preferred to themselves with an inverted relation


def train_clip(job: Job) -> None:
    """Text and image encoder, with a contrastive loss against captions that are wrong in one respect.

    Content that no caption states is learned by the image encoder through a decoder of its embedding that is discarded.
    """
    tokenizer = own_tokenizer()
    scenes = ordinary_scenes(job, job.scenes)
    texts = contrasts(scenes, recipe.WRONG_CAPTIONS_PER_SCENE, tokenizer, job.seed("contrasts"))
    texts = shortened(texts, tokenizer).to(job.device)
    side = recipe.VISION["image_size"]

    def scene_part(number: int, count: int) -> list[Tensor]:
        rows = slice(number * count, number * count + count)
        return [pictures(scenes.rows(rows), job.device, smaller=side), texts[rows]]

    def wide_part(number: int, count: int) -> list[Tensor]:
        return [shrunk(wide(count, job.seed("wide", number), job.device), side)]

    pool, wide_pool = (
        job.pool(scene_part, 1, first=0.2, every=60),
        job.pool(wide_part, 0.3, every=200, endless=True),
    )
    mean, std = pixel_statistics(job.device)
    networks = {
        "text": build_text_model(text_config(tokenizer)).to(job.device),
        "image": build_vision_model(recipe.VISION).to(job.device),
        "scale": nn.ParameterList([torch.tensor(2.0, device=job.device)]),
        "decoder": EmbeddingDecoder(recipe.VISION["projection_dim"]).to(
            device=job.device, memory_format=torch.channels_last  # pyright: ignore[reportCallIssue]
        ),
    }  # fmt: skip
    text_model, image_model, scale, decoder = networks.values()
    layer = job.compile_function(encoder_layer)

    def draw(step: int) -> Batch:
        pool.advance(step)
        wide_pool.advance(step)
        images, tokens = pool.take(job.settings.batch_size)
        more = wide_pool.take(max(job.settings.batch_size // 4, 1))[0]  # M
        return Batch([images, tokens, more])

    def loss(images: Tensor, tokens: Tensor, more: Tensor) -> dict[str, Tensor]:
        pixels = as_float(torch.cat([images, more]))
        embedded = image_embeddings(image_model, (pixels - mean) / std, layer)  # (B + M, E)
        pooled = text_states(
            text_model, tokens.flatten(0, 1).long(), tokenizer.end_token, layer
        ).pooled.unflatten(0, tokens.shape[:2])  # (B, 2 + N, E)
        terms = contrastive_loss(embedded[: len(images)], pooled[:, 0], pooled[:, 1:], scale[0])
        decoded = decoder(embedded[-2 * len(more) :])  # of wide pictures and as many ordinary ones
        pixels, size = pixels[-len(decoded) :], decoded.shape[-2:]
        error = weighted_mse(decoded, resized(pixels, size), outline_weights(pixels, size))
        states_relation = tokens[:, -1, 1] != tokenizer.end_token  # else the last caption is empty
        return {
            **terms,
            RELATIONS: share_right(embedded[: len(images)], pooled[:, 0], pooled[:, -1], states_relation),
            "loss": terms["loss"] + recipe.PICTURE_SHARE * error,
            "contrast": terms["loss"],
            "picture": error,
        }

    def export(weights: Weights) -> None:
        export_image_encoder(job, weights)
        export_text_encoder(job, weights)

    job.train(networks, lambda: draw, loss, export)


def train_layout(job: Job) -> None:
    """Trains the text encoder further after `clip`, on captions alone: a step takes a tenth of the time of clip's."""
    tokenizer = own_tokenizer()
    scenes = ordinary_scenes(job, job.scenes, "layout")
    texts = shortened(contrasts(scenes, 0, tokenizer, job.seed("layout")), tokenizer).to(job.device)
    layouts = layout_of(scenes, job.device)
    networks = {
        "text": build_text_model(text_config(tokenizer)).to(job.device),
        "reader": LayoutReader(recipe.TEXT["projection_dim"]).to(job.device),
    }
    text_model, reader = networks.values()
    layer = job.compile_function(encoder_layer)

    def draw(step: int) -> Batch:
        rows = torch.randint(len(texts), (job.settings.batch_size,), device=job.device)
        return Batch([texts[rows], *(column[rows] for column in layouts)])

    def loss(tokens: Tensor, *columns: Tensor) -> dict[str, Tensor]:
        layout = Layout(*columns)
        pooled = text_states(text_model, tokens.flatten(0, 1).long(), tokenizer.end_token, layer).pooled
        pooled = pooled.unflatten(0, tokens.shape[:2])  # the caption and its inverted one
        read = reader(pooled[:, 0])
        states_relation = tokens[:, 1, 1] != tokenizer.end_token  # else the inverted caption is empty
        nearer = place_error(read[1], layout) < place_error(reader(pooled[:, 1])[1], layout)
        relations = (nearer & states_relation).sum() / states_relation.sum().clamp(min=1)
        return {**layout_loss(read, layout), RELATIONS: relations}

    _train_after_clip(job, networks, job.text_encoder, draw, loss, export_text_encoder)


def train_vision(job: Job) -> None:
    """Trains the image encoder further after `clip`, on pictures alone, by what is read from its embeddings."""

    def part(number: int, count: int) -> list[Tensor]:
        ordinary = pack(ordinary_scenes(job, count // 2, "vision", number))
        generator = torch.Generator(job.device).manual_seed(job.seed("vision", number))
        anything = wide_scenes(count - count // 2, recipe.PICTURE, generator, job.device)
        parts = [ordinary.rows(slice(None), job.device), anything]
        images = torch.cat(
            [pictures(scenes, job.device, smaller=recipe.VISION["image_size"]) for scenes in parts]
        )
        return [images, *(torch.cat(column) for column in zip(*map(cells_of, parts), strict=True))]

    pool = job.pool(part, 1, first=0.2, every=40, endless=True)
    mean, std = pixel_statistics(job.device)
    networks = {
        "image": build_vision_model(recipe.VISION).to(job.device),
        "reader": CellReader(recipe.VISION["projection_dim"]).to(job.device),
    }
    image_model, reader = networks.values()
    layer = job.compile_function(encoder_layer)

    def draw(step: int) -> Batch:
        pool.advance(step)
        return Batch(pool.take(job.settings.batch_size))

    def loss(images: Tensor, *columns: Tensor) -> dict[str, Tensor]:
        pixels = (as_float(images) - mean) / std
        return cells_loss(reader(image_embeddings(image_model, pixels, layer)), Cells(*columns))

    _train_after_clip(job, networks, job.image_encoder, draw, loss, export_image_encoder)


def _train_after_clip(
    job: Job,
    networks: dict[str, nn.Module],
    load: Callable[[], Any],
    draw: Draw,
    loss: Loss,
    export: Callable[[Job, Weights], None],
) -> None:
    """Trains the first of the networks further, an encoder that `clip` trained; the other one, a reader of what it
    encodes, is discarded.
    """

    def prepare() -> Draw:
        next(iter(networks.values())).load_state_dict(load().model.state_dict())
        return draw

    job.train(networks, prepare, loss, partial(export, job), inputs=("clip",))


def shortened(texts: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Tokens (..., 77) cut after the longest, at a multiple of 8, since nothing sees past the end token."""
    longest = int((texts != tokenizer.end_token).sum(-1).max()) + 1
    return texts[..., : min(-(-longest // 8) * 8, texts.shape[-1])].contiguous()


def text_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {**recipe.TEXT, "vocab_size": len(tokenizer)}


def export_text_encoder(job: Job, weights: Weights) -> None:
    """Writes the text encoder's folder: weights and its own vocabulary."""
    config, words = text_config(own_tokenizer()), json.dumps(known_words())
    job.export("demo_text_encoder/model.safetensors", "text_encoder", weights["text"], config, words=words)
    save_vocabulary(job.out / "demo_text_encoder", *own_vocabulary())


def export_image_encoder(job: Job, weights: Weights) -> None:
    job.export("demo_image_encoder.safetensors", "image_encoder", weights["image"], recipe.VISION)
