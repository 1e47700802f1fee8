"""Measures the LoRA's new shape, the token's object, and four steps in place of twenty."""

from dataclasses import replace

import torch
from torch import Tensor

from cascade_nodes.cascade_core.adapters import Adapter, read_adapter
from cascade_nodes.cascade_core.adapters.apply import Patch
from cascade_nodes.cascade_core.adapters.tokens import taught_tokens
from cascade_nodes.demo.captions import Spec
from cascade_nodes.demo.evaluate import SEED, prompts_of
from cascade_nodes.demo.judge import read, score, summary
from cascade_nodes.demo.measuring import Figures
from cascade_nodes.demo.pipeline import PRIOR, DemoCascade, Sampling
from cascade_nodes.demo.scenes import sample_scenes
from cascade_nodes.demo.taught import LOOP, house_prompts, loop_prompts

FEW = Sampling(steps=4, cfg=1.0, sampler="lcm")


def adapter(cascade: DemoCascade, name: str) -> Adapter:
    return read_adapter(cascade.weights / name, cascade.stage_c)


def lora(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures houses, which the demo never saw, with and without the LoRA, and that it leaves no trace afterwards."""
    prompts, specs = house_prompts(count, SEED + 30)
    some = prompts[: cascade.batch]
    before = cascade.pictures(some, SEED)
    changes = adapter(cascade, "demo_lora_house.safetensors").stage_c

    def sample_at(strength: float) -> Tensor:
        with cascade.patched([Patch("house", changes, strength)]):
            return cascade.pictures(prompts, SEED)

    def houses(images: Tensor, names: list[Spec]) -> float:
        readings = read(images, taught=True)
        return summary(score(r, s) for r, s in zip(readings, names, strict=True))["all_right"]

    with_lora, without = sample_at(1.0), sample_at(0.0)
    only = [Spec((spec.objects[0],)) for spec in specs]
    ordinary, ordinary_specs = prompts_of(sample_scenes(count, SEED + 31, "held_out"))
    with cascade.patched([Patch("house", changes, 1.0)]):
        ordinary_images = cascade.pictures(ordinary, SEED)
    # On a card the weights stay changed until Stage C is used without the LoRA, so pictures are compared.
    after = cascade.pictures(some, SEED)
    return {
        "houses_right": houses(with_lora, only),
        "houses_right_without": houses(without, only),
        "right_in_everything": houses(with_lora, specs),
        "ordinary_prompts_right_with_it": houses(ordinary_images, ordinary_specs),
        "bit_identical_afterwards": float(before.equal(after)),
    }, torch.stack([without, with_lora], dim=1).flatten(0, 1)


def token(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures a token for the green ring, which the demo never saw, against the two words."""
    with_token, plain, specs = loop_prompts(count, SEED + 32)
    rows = cascade.text.model.text_model.embeddings.token_embedding.weight
    file = adapter(cascade, "demo_token_loop.safetensors")
    learned = taught_tokens(file, 1.0, cascade.text.tokenizer.backend.get_vocab(), rows)
    images = cascade.pictures(with_token, SEED, learned=learned)
    in_words = cascade.pictures(plain, SEED)
    objects = [Spec(tuple(o for o in s.objects if (o.shape, o.colour) == LOOP)) for s in specs]

    def right(images: Tensor, stated: list[Spec]) -> float:
        return summary(score(r, s) for r, s in zip(read(images), stated, strict=True))["all_right"]

    return {
        "object_right": right(images, objects),
        "object_right_in_words": right(in_words, objects),
        "right_in_everything": right(images, specs),
        "right_in_everything_in_words": right(in_words, specs),
    }, torch.stack([in_words, images], dim=1).flatten(0, 1)


def few_steps(cascade: DemoCascade, count: int) -> tuple[Figures, Tensor]:
    """Measures four steps and two of lcm with the distilled LoRA against twenty of dpmpp_2m without it."""
    prompts, specs = prompts_of(sample_scenes(count, SEED, "held_out"))
    changes = adapter(cascade, "demo_lora_few_steps.safetensors").stage_c

    def right(images: Tensor) -> float:
        return summary(score(r, s) for r, s in zip(read(images), specs, strict=True))["all_right"]

    usual = cascade.pictures(prompts, SEED)
    with cascade.patched([Patch("few steps", changes, 1.0)]):
        few_step_images = cascade.pictures(prompts, SEED, FEW)
        two_step_images = cascade.pictures(prompts, SEED, replace(FEW, steps=2))
    plain = cascade.pictures(prompts, SEED, Sampling(4, PRIOR.cfg, sampler=PRIOR.sampler))
    return {
        "right_at_20_steps": right(usual),
        "right_at_4_steps": right(few_step_images),
        "right_at_2_steps": right(two_step_images),
        "right_at_4_steps_without_lora": right(plain),
    }, torch.stack([usual, plain, few_step_images], dim=1).flatten(0, 1)


TAUGHT_TASKS = lora, token, few_steps
