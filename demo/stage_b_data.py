"""Stage B's training data: Stage A's and the compressor's latents of pictures, weights of outlines, and pooled text."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade_nodes.cascade_core.geometry import stage_b_size, stage_c_size
from cascade_nodes.cascade_core.text.encoder import encode_tokens
from cascade_nodes.demo import recipe
from cascade_nodes.demo.dataset import Size, as_float, captions, for_compressor, pictures, wide
from cascade_nodes.demo.drawing import OTHER_FRAMES, SQUARE, ordinary_scenes, other_frame
from cascade_nodes.demo.job import Job, in_parts
from cascade_nodes.demo.losses import NoiseLevels, outline_weights
from cascade_nodes.demo.network_task import Batch


class StageBData:
    """Batches by step: Stage A's latents, half of ordinary and half of wide pictures."""

    def __init__(self, job: Job):
        self.job = job

    def rehearsals(self) -> Iterator[list[Tensor]]:
        """A batch of arbitrary values for the square frame."""
        device, batch = self.job.device, self.job.settings.batch_size
        yield [
            torch.randn(batch, recipe.STAGE_B_LATENT[0], *stage_b_size(*SQUARE), device=device),
            torch.rand(batch, device=device),
            torch.randn(batch, recipe.STAGE_B_LATENT[0], *stage_b_size(*SQUARE), device=device),
            torch.ones(batch, device=device),
            torch.randn(batch, recipe.LATENT[0], *stage_c_size(*SQUARE), device=device),
            torch.randn(batch, 1, recipe.STAGE_B["c_clip"], device=device),
            torch.ones(batch, 1, *stage_b_size(*SQUARE), device=device),
        ]

    def load(self) -> None:
        """Loads the trained networks that make the data."""
        job = self.job
        encoder = job.text_encoder()
        self.text_model, self.tokenizer = (
            encoder.model.to(job.device).requires_grad_(False),
            encoder.tokenizer,
        )
        self.stage_a, self.compressor = (
            job.load(name).requires_grad_(False) for name in ("stage_a", "compressor")
        )
        empty = torch.tensor([[token for token, _ in self.tokenizer.empty_chunk()]], device=job.device)
        self.no_words = self._pooled(empty)[0]  # (P,)
        self.levels = NoiseLevels(job.device)
        self.pool = job.pool(self._part, 0.6, first=0.35, every=300, endless=True)
        self.others = {
            frame: job.pool(
                lambda number, count, frame=frame: self._part(number, count, frame),
                0.06,
                first=0.3,
                every=600,
            )
            for frame in OTHER_FRAMES
        }

    def _pooled(self, tokens: Tensor) -> Tensor:
        end = self.tokenizer.end_token
        return in_parts(lambda part: encode_tokens(self.text_model, part.long(), end).pooled, tokens)

    def _part(self, number: int, count: int, frame: Size = SQUARE) -> list[Tensor]:
        """Latents (N, 4, 64, 64), conditions (N, 16, 6, 6), weights of positions (N, 1, 64, 64), pooled text (N, P)."""
        job, what = self.job, (number, *frame)
        table = ordinary_scenes(job, count - count // 2, *what, frame=frame)
        images = torch.cat(
            [pictures(table, job.device, frame), wide(count // 2, job.seed("wide", *what), job.device, frame)]
        )
        texts = captions(table, 1, self.tokenizer, job.seed("captions", *what))[:, 0].to(job.device)
        pooled = torch.cat([self._pooled(texts), self.no_words.expand(count // 2, -1)])
        latents = in_parts(lambda part: self.stage_a.encode(as_float(part)).half(), images, 256)
        conditions = in_parts(lambda part: self.compressor(for_compressor(part)), images)
        size = latents.shape[-2:]
        places = in_parts(lambda part: outline_weights(as_float(part), size).half(), images, 256)
        return [latents, conditions, places, pooled]

    def draw(self, step: int) -> Batch:
        """Noised latents, noise conditions, epsilon, weights, conditions, pooled text (B, 1, P), positions' weights."""
        frame = other_frame(self.job, step, recipe.OTHER_FRAMES_SHARE)
        pool = self.pool if frame is None else self.others[frame]
        pool.advance(step)
        latents, effnet, places, pooled = pool.take(self.job.settings.batch_size)
        chance = torch.rand(5, len(latents), 1, device=self.job.device)
        clip = torch.where(chance[0] < 0.25, pooled.roll(1, 0), pooled)
        clip = torch.where(chance[1] < 0.3, self.no_words, clip) * (chance[2] < 0.6)
        strength = recipe.EFFNET_NOISE * chance[3].square()[..., None, None]
        effnet = effnet + strength * torch.randn_like(effnet)
        effnet = effnet * (chance[4] >= 0.05)[..., None, None]
        noised = self.levels.noise(latents.float())
        return Batch([*noised, effnet, clip[:, None], places.float()], rare=frame is not None)
