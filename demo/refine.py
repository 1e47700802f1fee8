"""What the cascade learns after its first training: pictures as prompts, and pictures larger than 256×256."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_nodes.cascade_core.layers import resize
from cascade_nodes.cascade_core.text import TextEncoder, encode_tokens
from cascade_nodes.cascade_core.training.objectives import diffusion_loss
from cascade_nodes.cascade_core.vision import CLIP_MEAN, CLIP_STD, ImageEncoder
from cascade_nodes.demo import recipe
from cascade_nodes.demo.dataset import as_float, captions, for_compressor, pictures, resized
from cascade_nodes.demo.job import Job, export_text_encoder, in_parts, semantic_latents
from cascade_nodes.demo.scenes import alone, redrawn
from cascade_nodes.demo.world import Scene

WITH_PICTURE = 0.45  # of the prompts; the others are text alone, as in the first training
TWO_PICTURES = 0.4  # of the prompts with pictures
LARGE = 2 * recipe.PICTURE  # pixels
LARGE_BATCH = 16  # whole large pictures in a step, beside the crops


def small_pictures(job: Job, scenes: Sequence[Scene]) -> Tensor:
    """Scenes as the image encoder reads them: uint8 (N, 3, 96, 96)"""
    return pictures(scenes, job.device, smaller=recipe.VISION["image_size"])


def train_prompts(job: Job) -> None:
    """Stage C with both encoders, on pictures as prompts: one, or two whose objects come together.

    The picture of a prompt is never the one that is to come out: the same things stand elsewhere in it, so that the
    embedding learns what a picture shows and leaves the rest to the seed. Of two pictures each shows one object alone.
    """
    text = TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32)
    text_model, tokenizer = text.model.to(job.device).requires_grad_(True), text.tokenizer
    vision = ImageEncoder.load(job.weights / "demo_image_encoder.safetensors", dtype=torch.float32)
    image_model = vision.model.to(job.device).requires_grad_(True)
    scenes = sorted(job.train_scenes(0.5), key=lambda scene: len(scene.objects))  # those of one object first
    single = sum(len(scene.objects) == 1 for scene in scenes)
    latents = semantic_latents(job, scenes)
    sources = small_pictures(job, redrawn(scenes, job.settings.seed))
    objects = [small_pictures(job, alone(scenes[single:], slot, job.settings.seed)) for slot in (0, 1)]
    texts = captions(scenes, recipe.CAPTIONS_PER_SCENE, tokenizer, job.settings.seed).to(job.device)
    empty = torch.tensor([token for token, _ in tokenizer.empty_chunk()], device=job.device)
    mean, std = (torch.tensor(v, device=job.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    model = job.load("stage_c").train().requires_grad_(True)
    network = job.compile(model.to(memory_format=torch.channels_last))

    def embed(images: Tensor) -> Tensor:
        return image_model(pixel_values=(as_float(images) - mean) / std).image_embeds  # (B, E)

    def encode(rows: Tensor, chance_of_none: Tensor | float) -> tuple[Tensor, Tensor]:
        """Text states and pooled text of a caption of each row, or of none."""
        chance = torch.rand(2, len(rows), device=job.device)
        pick = (chance[1] * texts.shape[1]).long()
        none = chance[0] < chance_of_none
        tokens = torch.where(none[:, None], empty, texts[rows, pick].long())
        states, pooled = encode_tokens(text_model, tokens, tokenizer.end_token)
        return states, pooled[:, None]

    def one_picture(count: int) -> dict[str, Tensor]:
        """Text, or a picture, or both."""
        rows = torch.randint(len(latents), (count,)).to(job.device)
        shown = int(count * WITH_PICTURE * (1 - TWO_PICTURES) / (1 - WITH_PICTURE * TWO_PICTURES))
        image = torch.zeros(count, 1, recipe.STAGE_C["c_clip_img"], device=job.device)
        image[:shown, 0] = embed(sources[rows[:shown]]).float()
        has_picture = torch.arange(count, device=job.device) < shown
        states, pooled = encode(rows, torch.where(has_picture, 0.7, 0.1))
        return diffusion_loss(lambda x, r: network(x, r, states, pooled, image), latents[rows])

    def two_pictures(count: int) -> dict[str, Tensor]:
        rows = torch.randint(len(objects[0]), (count,)).to(job.device)
        image = torch.stack([embed(shown[rows]) for shown in objects], dim=1)  # (B, 2, E)
        image = torch.where(torch.rand(count, 1, 1, device=job.device) < 0.5, image, image.flip(1))
        states, pooled = encode(rows + single, 0.7)
        return diffusion_loss(lambda x, r: network(x, r, states, pooled, image), latents[rows + single])

    def loss(step: int) -> dict[str, Tensor]:
        both = int(job.settings.batch_size * WITH_PICTURE * TWO_PICTURES)
        share = both / job.settings.batch_size
        one, two = one_picture(job.settings.batch_size - both), two_pictures(both)
        return {
            "loss": (1 - share) * one["loss"] + share * two["loss"],
            "one": one["epsilon"],
            "two": two["epsilon"],
        }

    average = job.train(
        {"stage_c": model, "text": text_model, "image": image_model}, loss, groups={"text": 0.3, "image": 1.0}
    )
    job.export("demo_stage_c.safetensors", "stage_c", average["stage_c"], recipe.STAGE_C)
    job.export("demo_image_encoder.safetensors", "image_encoder", average["image"], recipe.VISION)
    export_text_encoder(job, average["text"], {**recipe.TEXT, "vocab_size": len(tokenizer)}, tokenizer)


def train_sizes(job: Job) -> None:
    """Stage B, on pictures of 256 and of 512 pixels: whole, and crops of the larger ones as tiles are.

    The larger ones are unfolded from Stage C's latent of their own size or from that of the small picture, so that
    Stage C can stay at the size it knows.
    """
    text = TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32)
    text.model.to(job.device).requires_grad_(False)
    stage_a, compressor = job.load("stage_a"), job.load("compressor")
    scenes = job.train_scenes(0.3)
    large = scenes[: len(scenes) // 3]
    small_latents, _, small_conditions = _stage_b_data(job, stage_a, compressor, scenes, recipe.PICTURE)
    latents, own, shared = _stage_b_data(job, stage_a, compressor, large, LARGE)
    texts = captions(scenes, 1, text.tokenizer, job.settings.seed)[:, 0].to(job.device)
    end = text.tokenizer.end_token
    pooled = in_parts(lambda part: encode_tokens(text.model, part.long(), end).pooled, texts)  # (N, P)
    model = job.load("stage_b").train().requires_grad_(True)
    network = job.compile(model.to(memory_format=torch.channels_last))
    side = recipe.STAGE_B_LATENT[1]
    places = side // recipe.STAGE_B["patch_size"]

    def dropped(rows: Tensor, effnet: Tensor) -> tuple[Tensor, Tensor]:
        """The conditions noised and left out as in the first training."""
        chance = torch.rand(3, len(rows), 1, device=job.device)
        clip = pooled[torch.where(chance[0, :, 0] < 0.25, rows.roll(1), rows)] * (chance[1] < 0.5)
        strength = 0.25 * torch.rand(len(rows), 1, 1, 1, device=job.device)
        effnet = effnet + strength * torch.randn_like(effnet)
        return clip[:, None], effnet * (chance[2] >= 0.05)[..., None, None]

    def predicted(x0: Tensor, rows: Tensor, effnet: Tensor) -> Tensor:
        clip, effnet = dropped(rows, effnet)
        return diffusion_loss(lambda noised, r: network(noised, r, effnet, clip), x0.float())["loss"]

    def rows_of(data: Tensor, count: int) -> Tensor:
        return torch.randint(len(data), (count,)).to(job.device)

    def crops(count: int) -> Tensor:
        """A quarter of a large picture, anywhere on the grid of Stage B's positions."""
        rows = rows_of(latents, count)
        own_latent = torch.rand(count, 1, 1, 1, device=job.device) < 0.5
        effnet = torch.where(
            own_latent,
            resize(own[rows], (2 * places, 2 * places)),
            resize(shared[rows], (2 * places, 2 * places)),
        )
        top, left = (int(place) for place in torch.randint(places + 1, (2,)))
        patch = recipe.STAGE_B["patch_size"]
        cut = latents[rows, :, patch * top : patch * top + side, patch * left : patch * left + side]
        return predicted(cut, rows, effnet[..., top : top + places, left : left + places])

    def loss(step: int) -> dict[str, Tensor]:
        half = job.settings.batch_size // 2
        rows, whole_rows = rows_of(small_latents, half), rows_of(latents, LARGE_BATCH)
        condition = shared if step % 2 else own
        terms = {
            "small": predicted(small_latents[rows], rows, small_conditions[rows]),
            "crops": crops(half),
            "whole": predicted(latents[whole_rows], whole_rows, condition[whole_rows]),
        }
        return {"loss": 0.4 * terms["small"] + 0.35 * terms["crops"] + 0.25 * terms["whole"], **terms}

    average = job.train({"stage_b": model}, loss)
    job.export("demo_stage_b.safetensors", "stage_b", average["stage_b"], recipe.STAGE_B)


def _stage_b_data(
    job: Job, stage_a, compressor, scenes: Sequence[Scene], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage A's latents (N, 4, size / 4, size / 4) in half precision, and the compressor's at this size and at 256."""
    latents, own, shared = [], [], []
    read_at = recipe.COMPRESSED * size // recipe.PICTURE
    for start in range(0, len(scenes), 2048):
        images = pictures(scenes[start : start + 2048], job.device, size)
        latents.append(in_parts(lambda part: stage_a.encode(as_float(part)).half(), images, 128))
        shared.append(in_parts(lambda part: compressor(for_compressor(part)), images, 512))
        if size != recipe.PICTURE:
            own.append(in_parts(lambda part: compressor(resized(as_float(part), read_at)), images, 256))
    shared = torch.cat(shared)
    return torch.cat(latents), torch.cat(own) if own else shared, shared
