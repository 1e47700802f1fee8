"""Stage C's training data: latents, captions, and pictures as prompts, one or several."""

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

from cascade_nodes.cascade_core.geometry import stage_c_size
from cascade_nodes.cascade_core.hints.masks import latent_mask
from cascade_nodes.cascade_core.text.tokenizer import CHUNK_LENGTH, Tokenizer
from cascade_nodes.demo import recipe
from cascade_nodes.demo.clip_states import pixel_statistics
from cascade_nodes.demo.dataset import (
    Size,
    alone,
    as_float,
    captions,
    edited,
    for_compressor,
    pictures,
    shrunk,
    wide,
)
from cascade_nodes.demo.drawing import OTHER_FRAMES, SQUARE, ordinary_scenes
from cascade_nodes.demo.job import Job, in_parts
from cascade_nodes.demo.losses import NoiseLevels
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.pool import Pool
from cascade_nodes.demo.scenes import SceneTable

TOGETHER = {2: 1 / 4, 3: 1 / 8}  # number of objects, each a picture prompt of its own -> share of such scenes
FRAME_SHARE = 1 / 8  # share of scenes for each other frame


class StageCData:
    """Batches of latents with words and image embeddings, by step.

    Captions are made first, on all cores, before the accelerator is used.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.job, self.tokenizer = job, tokenizer
        self.scene_table = self._captioned(ordinary_scenes(job, job.scenes), "all")
        self.frame_tables = {
            frame: self._captioned(ordinary_scenes(job, self._rows(FRAME_SHARE), frame, frame=frame), frame)
            for frame in OTHER_FRAMES
        }
        self.object_tables: dict[int, tuple[SceneTable, Tensor]] = {}
        for n, share in TOGETHER.items():
            table = ordinary_scenes(job, self._rows(share), n, objects=[float(n == i) for i in (1, 2, 3)])
            self.object_tables[n] = self._captioned(table, n)
        print(f"{job.folder.name}: captions are there", flush=True)

    def rehearsals(self) -> Iterator[list[Tensor]]:
        """Batches of arbitrary values: one and two picture prompts in the square, then other frames."""
        shapes = [(1, SQUARE), (2, SQUARE), *((1, frame) for frame in OTHER_FRAMES)]
        batch, device = self.job.settings.batch_size, self.job.device
        for pictures_each, frame in shapes:
            size = stage_c_size(*frame)
            yield [
                torch.randn(batch, recipe.LATENT[0], *size, device=device),
                torch.rand(batch, device=device),
                torch.randn(batch, recipe.LATENT[0], *size, device=device),
                torch.ones(batch, device=device),
                torch.full((batch, CHUNK_LENGTH), self.tokenizer.end_token, device=device),
                torch.randn(batch, pictures_each, recipe.STAGE_C["c_clip_img"], device=device),
                torch.ones(batch, 1, *size, device=device),
            ]

    def load(self) -> None:
        """Loads the trained networks that make the data."""
        job = self.job
        self.empty = torch.tensor([token for token, _ in self.tokenizer.empty_chunk()], device=job.device)
        self.compressor = job.load("compressor").requires_grad_(False)
        self.vision = job.image_encoder()
        self.vision.model.to(job.device)
        self.mean, self.std = pixel_statistics(job.device)
        self.levels = NoiseLevels(job.device)
        self.scenes = job.pool(lambda i, n: self._scenes(*self.scene_table, i, n), 1, first=0.15, every=120)
        self.wide = job.pool(self._wide, 0.2, first=0.2, every=200)
        self.edited = job.pool(lambda i, n: self._edited(*self.scene_table, i, n), 0.2, first=0.2, every=200)
        self.frames = {
            frame: job.pool(
                lambda i, n, frame=frame: self._framed(*self.frame_tables[frame], frame, i, n),
                FRAME_SHARE, first=0.2, every=400,
            )
            for frame in OTHER_FRAMES
        }  # fmt: skip
        self.together = {
            count: job.pool(
                lambda i, n, count=count: self._together(*self.object_tables[count], count, i, n),
                share, first=0.2, every=200,
            )
            for count, share in TOGETHER.items()
        }  # fmt: skip

    def _rows(self, share: float) -> int:
        return max(int(self.job.scenes * share), 16)

    def _captioned(self, table: SceneTable, what: object) -> tuple[SceneTable, Tensor]:
        seed = self.job.seed("captions", what)
        return table, captions(table, recipe.CAPTIONS_PER_SCENE, self.tokenizer, seed)

    def _embed(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, E)"""
        side = self.vision.image_size
        return in_parts(
            lambda part: self.vision.encode_pixels((as_float(shrunk(part, side)) - self.mean) / self.std),
            images,
        )

    def _compress(self, images: Tensor) -> Tensor:
        return in_parts(lambda part: self.compressor(for_compressor(part)), images)

    # Parts of the pools: latents (N, 16, h, w), image embeddings (N, n, E), captions (N, K, 77).

    def _scenes(self, table: SceneTable, texts: Tensor, number: int, size: int) -> list[Tensor]:
        """Scenes with the whole picture as a prompt."""
        rows = slice(number * size, number * size + size)
        images = pictures(table.rows(rows), self.job.device)
        return [self._compress(images), self._embed(images)[:, None], texts[rows].to(self.job.device)]

    def _framed(self, table: SceneTable, texts: Tensor, frame: Size, number: int, size: int) -> list[Tensor]:
        """Scenes in other frames, without picture prompts, which would only show the middle square."""
        rows = slice(number * size, number * size + size)
        latents = self._compress(pictures(table.rows(rows), self.job.device, frame))
        nothing = latents.new_zeros(size, 1, recipe.STAGE_C["c_clip_img"])
        return [latents, nothing, texts[rows].to(self.job.device)]

    def _together(self, table: SceneTable, texts: Tensor, count: int, number: int, size: int) -> list[Tensor]:
        """Scenes of `count` objects, with a separate picture of each object as prompts."""
        rows, device = slice(number * size, number * size + size), self.job.device
        table = table.rows(rows)
        single = [
            self._embed(pictures(alone(table, slot, self.job.seed("alone", count, number)), device))
            for slot in range(count)
        ]
        images = pictures(table, device)
        return [self._compress(images), torch.stack(single, dim=1), texts[rows].to(device)]

    def _edited(self, table: SceneTable, texts: Tensor, number: int, size: int) -> list[Tensor]:
        """Scenes whose latents outside of a mask (N, 1, 6, 6) come from a scene with another object in the mask, as
        in inpainting.

        Latents beside an object show traces of it; where these are another object's, words must count more.
        """
        rows, device = slice(number * size, number * size + size), self.job.device
        table = table.rows(rows)
        before, masks = edited(table, self.job.seed("edited", number))
        inside = latent_mask(masks, size, recipe.LATENT[1:]).to(device)
        images, others = (pictures(scenes, device) for scenes in (table, before))
        latents = torch.where(inside > 0, self._compress(images), self._compress(others))
        return [latents, inside, texts[rows].to(device)]

    def _wide(self, number: int, size: int) -> list[Tensor]:
        """Wide pictures, which have no captions."""
        images = wide(size, self.job.seed("wide", number), self.job.device, SQUARE)
        return [self._compress(images), self._embed(images)[:, None]]

    def draw(self, step: int) -> Batch:
        """Noised latents, noise conditions, epsilon, weights, tokens (B, 77), image embeddings (B, n, E), places.

        places: (B, 1, h, w), weights of the latents' positions.
        """
        batch, random = self.job.settings.batch_size, Random(self.job.seed("kind", step))
        pool, image_share, rare = self._choose(random)
        pool.advance(step)
        latents, images, tokens = pool.take(batch)
        with_image = self._chance(batch) < image_share
        without_words = torch.where(with_image, self._chance(batch) < 0.5, self._chance(batch) < 0.1)
        places = torch.ones_like(latents[:, :1])
        if pool is self.scenes:
            rows = slice(0, int(recipe.STAGE_C_WIDE * batch))
            self.wide.advance(step)
            latents[rows], images[rows] = self.wide.take(rows.stop)
            with_image[rows], without_words[rows] = True, True
            rows = slice(rows.stop, rows.stop + int(recipe.STAGE_C_EDITED * batch))
            self.edited.advance(step)
            latents[rows], inside, tokens[rows] = self.edited.take(rows.stop - rows.start)
            with_image[rows] = False
            without_words[rows] = self._chance(len(inside)) < 0.1
            places[rows] = inside / inside.mean(dim=(1, 2, 3), keepdim=True)
        images = images * with_image[:, None, None]
        words = self._worded(tokens, without_words)
        order = torch.randperm(batch, device=self.job.device)  # the first rows are pure noise
        noised = self.levels.noise(latents[order])
        return Batch([*noised, words[order], images[order], places[order]], rare)

    def _choose(self, random: Random) -> tuple[Pool, float, bool]:
        """A step's pool, the share of its rows with image prompts, and whether its shape is rare."""
        kind, shares = random.random(), recipe.STAGE_C_STEPS
        if kind < shares["frames"]:
            return self.frames[random.choice(OTHER_FRAMES)], 0.0, True
        if kind < shares["frames"] + shares["together"]:
            count = max(TOGETHER) if random.random() < shares["three"] else 2
            return self.together[count], 0.75, count > 2
        return self.scenes, recipe.STAGE_C_PICTURES, False

    def _chance(self, size: int) -> Tensor:
        return torch.rand(size, device=self.job.device)

    def _worded(self, tokens: Tensor, without: Tensor) -> Tensor:
        """One of each row's captions (B, K, 77), the empty one where `without`: (B, 77) int64"""
        pick = torch.randint(tokens.shape[1], (len(tokens), 1, 1), device=tokens.device)
        chosen = tokens.gather(1, pick.expand(-1, 1, tokens.shape[-1]))[:, 0]
        return torch.where(without[:, None], self.empty, chosen.long())
