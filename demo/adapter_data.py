"""Training data of adapters: latents, captions and hints of pictures that are drawn on the accelerator."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from cascade_nodes.cascade_core.hints.filters import inpaint_hint
from cascade_nodes.cascade_core.hints.kinds import KINDS
from cascade_nodes.cascade_core.hints.masks import latent_mask
from cascade_nodes.cascade_core.networks.compressor import SemanticCompressor
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.text.tokenizer import CHUNK_LENGTH, Tokenizer
from cascade_nodes.cascade_core.training.data.hints import Tools, hint_maker
from cascade_nodes.cascade_core.training.settings import ControlNetSettings, Settings
from cascade_nodes.demo import recipe
from cascade_nodes.demo.dataset import captions, edited, for_compressor, pictures, to_uint8, write_words
from cascade_nodes.demo.drawing import ordinary_scenes
from cascade_nodes.demo.job import Job, in_parts
from cascade_nodes.demo.losses import NoiseLevels
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.render_folder import Captioned
from cascade_nodes.demo.scenes import SceneTable
from cascade_nodes.demo.taught import house_scenes, house_words, loop_captions
from cascade_nodes.demo.world import Packed, pack

CAPTIONS = 4  # of each scene
AT_ONCE = 256  # pictures whose hints are made together
HOUSES, LOOPS = 30_000, 4_000  # most scenes with the taught object
# Shares of the masks for an inpainting ControlNet: around an object that is replaced, and of a side of the frame; the
# others are drawn as by `cascade train`.
EDITED, SIDES = 0.5, 0.2
OUTSIDE = 0.25  # weight of positions outside of the mask

Names = dict[str, range]  # ids of learned tokens by their name in captions


class Captions(NamedTuple):
    """Scenes with their words."""

    scenes: SceneTable | Packed
    tokens: Tensor  # (N, K, 77) int16


def ordinary(job: Job, tokenizer: Tokenizer) -> Captions:
    table = ordinary_scenes(job, job.scenes)
    return Captions(table, captions(table, CAPTIONS, tokenizer, job.seed("captions")))


def houses(job: Job, tokenizer: Tokenizer) -> Captions:
    scenes = house_scenes(min(job.scenes, HOUSES), job.seed("houses"))
    words = partial(house_words, count=CAPTIONS)
    tokens = write_words(words, scenes, tokenizer, job.seed("captions"))
    return Captions(pack([scene for scene, _ in scenes]), tokens.view(len(scenes), CAPTIONS, CHUNK_LENGTH))


def loops(job: Job, tokenizer: Tokenizer, names: Names) -> Captions:
    found = list(loop_captions(min(job.scenes, LOOPS), job.seed("loops")))
    tokens = [_named(item, tokenizer, names) for item in found]
    return Captions(pack([item.scene for item in found]), torch.tensor(tokens, dtype=torch.int16))


def _named(item: Captioned, tokenizer: Tokenizer, names: Names) -> list[list[int]]:
    """A scene's captions as tokens, learned tokens included; repeated if there are too few."""
    chunks = [tokenizer.chunks(text, names)[0] for text in islice(cycle(item.captions), CAPTIONS)]
    return [[token for token, _ in chunk] for chunk in chunks]


class AdapterData:
    """Batches by step, of latents and captions; for a ControlNet, hints too.

    The captions are made before anything is on the accelerator.
    """

    def __init__(self, job: Job, settings: Settings, encoder: TextEncoder, source: Captions):
        self.job, self.settings, self.source = job, settings, source
        self.empty = torch.tensor([token for token, _ in encoder.tokenizer.empty_chunk()])
        print(f"{job.folder.name}: captions of {len(source.tokens)} scenes are there", flush=True)

    def load(self) -> None:
        job, objective = self.job, self.settings.objective
        self.compressor: SemanticCompressor = job.load("compressor").requires_grad_(False).eval()
        self.empty = self.empty.to(job.device)
        self.levels = NoiseLevels(job.device, objective.max_loss_weight or 16.0, objective.pure_noise_share)
        rows = len(self.source.tokens)
        self.pool = job.pool(self._maker(), rows / job.scenes, first=0.2, every=25)

    def _maker(self) -> Callable[[int, int], Sequence[Tensor]]:
        if self.settings.task != "controlnet":
            return self._plain
        controlnet = self.settings.controlnet
        return self._inpainted if controlnet.hint == "inpainting" else partial(self._hinted, controlnet)

    # Parts of the pool: captions (N, K, 77), latents (N, 16, h, w), hints (N, C, H, W), weights of positions (N, 1,
    # h, w).

    def _scenes(self, number: int, count: int) -> tuple[Tensor, SceneTable | Packed]:
        rows, scenes = slice(number * count, number * count + count), self.source.scenes
        chosen = scenes.rows(rows, "cpu") if isinstance(scenes, Packed) else scenes.rows(rows)
        return self.source.tokens[rows].to(self.job.device), chosen

    def _plain(self, number: int, count: int) -> list[Tensor]:
        tokens, scenes = self._scenes(number, count)
        images = pictures(scenes, self.job.device)
        return [tokens, in_parts(lambda part: self.compressor(for_compressor(part)), images)]

    def _hinted(self, controlnet: ControlNetSettings, number: int, count: int) -> list[Tensor]:
        tokens, scenes = self._scenes(number, count)
        make, tools = hint_maker(controlnet), Tools(self.compressor)
        generator = torch.Generator().manual_seed(self.job.seed("hints", number))
        pixels_in_hint = KINDS[controlnet.hint].backbone == "effnet"
        latents, hints = [], []
        for part in pictures(scenes, self.job.device).split(AT_ONCE):
            pixels = for_compressor(part)
            hint = make(pixels, generator, tools)
            hints.append(to_uint8(hint) if pixels_in_hint else hint)
            latents.append(self.compressor(pixels))
        return [tokens, torch.cat(latents), torch.cat(hints), torch.ones_like(torch.cat(latents)[:, :1])]

    def _inpainted(self, number: int, count: int) -> list[Tensor]:
        """Pictures whose latents outside of a mask come from another picture, with another object in it or none.

        So it is in sampling: the latents that are kept around a mask still show traces of the object that was in it.
        """
        tokens, scenes = self._scenes(number, count)
        assert isinstance(scenes, SceneTable)
        device, seed = self.job.device, self.job.seed("masks", number)
        generator, rng = torch.Generator().manual_seed(seed), Random(seed)
        images = pictures(scenes, device)
        before = images.clone()
        objects, sides = int(EDITED * count), int(SIDES * count)
        changed, masks_of_objects = edited(scenes.rows(slice(objects)), seed)
        before[:objects] = pictures(changed, device)
        latents, hints, places = [], [], []
        make = hint_maker(ControlNetSettings(hint="inpainting"))
        for start in range(0, count, AT_ONCE):
            rows = range(start, min(start + AT_ONCE, count))
            pixels, old = (for_compressor(each[rows.start : rows.stop]) for each in (images, before))
            masks = make(pixels, generator, Tools())[:, 3]  # (B, H, W)
            own = masks_of_objects[rows.start : rows.stop].to(device)
            if len(own):
                masks[: len(own)] = latent_mask(own, len(own), pixels.shape[-2:])[:, 0]
            for row in range(max(rows.start, objects), min(rows.stop, objects + sides)):
                masks[row - rows.start] = _side(masks[0], rng)
            emptied = torch.rand(len(rows), generator=generator) < 0.5
            emptied[: len(own)] = False
            old = torch.where((masks[:, None] > 0) & emptied.to(device).view(-1, 1, 1, 1), 0.5, old)
            grown = (torch.rand(len(rows), generator=generator) < 0.5).to(device).view(-1, 1, 1, 1)
            size = recipe.LATENT[1:]
            inside = torch.where(
                grown, latent_mask(masks, len(rows), size, 1), latent_mask(masks, len(rows), size)
            )
            latents.append(torch.where(inside > 0, self.compressor(pixels), self.compressor(old)))
            hints.append(to_uint8(inpaint_hint(pixels, masks)))
            share = inside.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1 / inside[0].numel())
            places.append(OUTSIDE + (1 - OUTSIDE) * inside / share)
        return [tokens, torch.cat(latents), torch.cat(hints), torch.cat(places)]

    def take(self, step: int) -> tuple[Tensor, list[Tensor]]:
        """A step's tokens (B, 77), some of them without words, and the pool's other tensors."""
        self.pool.advance(step)
        tokens, *others = self.pool.take(self.job.settings.batch_size)
        pick = torch.randint(tokens.shape[1], (len(tokens), 1, 1), device=tokens.device)
        chosen = tokens.gather(1, pick.expand(-1, 1, tokens.shape[-1]))[:, 0].long()
        without = torch.rand(len(tokens), 1, device=tokens.device) < self.settings.data.caption_dropout
        return torch.where(without, self.empty, chosen), others

    def draw(self, step: int) -> Batch:
        """Noised latents, noise conditions, epsilon, weights, tokens (B, 77); for a ControlNet hints and weights."""
        tokens, (latents, *others) = self.take(step)
        return Batch([*self.levels.noise(latents), tokens, *others])


def _side(like: Tensor, rng: Random) -> Tensor:
    """A mask of about half the frame (H, W), at any of its sides."""
    along = torch.arange(like.shape[-1], device=like.device) / like.shape[-1]
    part = (along < rng.uniform(0.3, 0.7)).float()
    part = part.flip(0) if rng.random() < 0.5 else part
    mask = part.expand(like.shape)
    return mask.T if rng.random() < 0.5 else mask


Source = Callable[..., Captions]
SOURCES: dict[str, Source] = {"house": houses, "loop": loops}


def source_of(name: str) -> Source:
    """The function that makes an adapter's scenes and captions, by the adapter's name."""
    return SOURCES.get(name, ordinary)
