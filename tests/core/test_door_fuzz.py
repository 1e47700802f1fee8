"""Random arguments to the front door: each call works, or is refused with one clean sentence.

A sample stands here; every night draws SEEDS of them. A call is repeated by its seed: `check(cascade, seed)`.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError, Control, Interrupted, StableCascade, StageSettings
from cascade_nodes.demo.door import WEIGHTS

FEW = StageSettings(steps=1, cfg=2.0, cfg_rescale=0.0)
SEEDS = 600
SAMPLE = 60
CALLS = ("__call__", "prior", "decode", "encode", "second_pass", "add_lora")

Draw = Callable[[random.Random], Any]


ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0\ud800\x1b[31m",
    b"\xff",
    [],
    {},
    (),
    object(),
)
ODD = (
    *ODD,
    np.float32(0.5),
    np.int64(2),
    np.array([1, 2]),
    torch.tensor(1),
    torch.ones(2),
    print,
    type,
    [[[]]] * 2,
    1j,
)


def one_of(*usual: Any) -> Draw:
    """One of the values, or now and then anything."""
    return lambda draw: draw.choice(usual if draw.random() < 0.8 else ODD)


PICTURES = tuple(
    torch.rand(batch, height, width, 3) for batch, height, width in ((1, 64, 64), (2, 64, 64), (1, 40, 96))
)


def odd_tensor(draw: random.Random) -> Any:
    shape = [draw.choice((0, 1, 2, 3, 4, 16, 64)) for _ in range(draw.randrange(6))]
    kind = draw.choice(
        (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.uint8,
            torch.int64,
            torch.bool,
            torch.complex64,
        )
    )
    tensor = torch.ones(shape, dtype=kind)
    change = draw.choice(
        (
            lambda t: t,
            lambda t: t.to("meta"),
            lambda t: t.to_sparse() if t.ndim else t,
            lambda t: t * float("nan") if t.is_floating_point() else t,
            lambda t: t.requires_grad_() if t.is_floating_point() else t,
            lambda t: t.flip(0) if t.ndim else t,
            lambda t: t.numpy() if kind != torch.bfloat16 else t,
            lambda t: t.numpy()[::-1] if kind != torch.bfloat16 and t.ndim else t,
        )
    )
    return change(tensor)


def picture(draw: random.Random) -> Any:
    chosen = draw.choice(PICTURES)
    return draw.choice(
        (
            lambda: chosen,
            lambda: chosen[0],
            lambda: chosen.numpy(),
            lambda: (chosen * 255).to(torch.uint8),
            lambda: Image.new(
                draw.choice(("RGB", "L", "RGBA", "P", "1", "I;16", "I", "F", "CMYK", "LAB", "YCbCr")),
                (64, 48),
            ),
            lambda: [Image.new("RGB", (64, 64)), chosen[0]],
            lambda: chosen * 255,
            lambda: torch.rand(3, 64, 64),
            lambda: "nowhere.png",
            lambda: WEIGHTS / "demo_stage_a.safetensors",
            lambda: odd_tensor(draw),
            lambda: draw.choice(ODD),
        )
    )()


def control(draw: random.Random) -> Any:
    file: Any = draw.choice(
        (
            "demo_controlnet_canny.safetensors",
            "demo_controlnet_inpainting.safetensors",
            "demo_stage_b.safetensors",
            "nowhere",
            3,
        )
    )
    more: dict[str, Draw] = {
        "image": picture,
        "mask": picture,
        "hint": odd_tensor,
        "strength": one_of(0.5, 0),
        "start": one_of(0.0, 0.5),
        "end": one_of(1.0, 0.5),
        "low": one_of(0, 100),
        "reads": one_of("small", "enlarged"),
    }
    names = draw.sample(sorted(more), draw.randrange(3))
    return Control(file, **{name: more[name](draw) for name in names})


def settings(draw: random.Random) -> Any:
    return StageSettings(draw.choice((1, 2)), draw.choice((1.0, 2.0)), shift=draw.choice((1.0, 2.0)))


SAMPLED: dict[str, Draw] = {
    "negative": one_of("", "green", "(green:1.3)"),
    "size": one_of((64, 64), (96, 64), (64, 72), (8, 8), [64, 64], (65, 64), (2**70, 8), (16392, 64)),
    "seed": one_of(0, 5, 2**64 - 1, 2**64),
    "engine": one_of(True, False),
    "callback": one_of(
        None, lambda progress: None, lambda progress: progress.preview(), lambda progress: False
    ),
}
STAGE: dict[str, Draw] = {
    "steps": one_of(1, 2),
    "cfg": one_of(1, 2.0),
    "cfg_rescale": one_of(0, 0.7),
    "shift": one_of(1, 2.0),
    "sampler": one_of("ddpm", "ddim", "lcm", "dpmpp_2m", "euler"),
    "denoise": one_of(0, 0.5, 1),
    "image": picture,
    "mask": picture,
}
PRIOR: dict[str, Draw] = {
    "batch": one_of(1, 2, 3, 2**70),
    "grow": one_of(0, 1, 16, 17),
    "image_prompts": lambda draw: one_of([picture(draw)], [(picture(draw), one_of(0, 0.5)(draw))])(draw),
    "controls": lambda draw: one_of([control(draw)], [control(draw), control(draw)])(draw),
}
DECODED: dict[str, Draw] = {
    "tile_size": one_of(0, 128, 64, 16384),
    "output": one_of("pil", "tensor", "jpeg"),
}
NAMED: dict[str, dict[str, Draw]] = {
    "__call__": {
        **SAMPLED,
        **STAGE,
        **PRIOR,
        **DECODED,
        "decoder": settings,
        "feather": one_of(0, 8),
        "room": one_of((0, 0, 8, 0), (8, 8, 8, 8), (-8, 0, 0, 0), (1, 2)),
    },
    "prior": {
        **SAMPLED,
        **STAGE,
        **PRIOR,
        "latent": lambda draw: draw.choice(
            (torch.rand(1, 16, 2, 2), torch.rand(2, 16, 2, 3), odd_tensor(draw))
        ),
    },
    "decode": {**SAMPLED, **STAGE, **DECODED},
    "encode": {"size": SAMPLED["size"], "tile_size": DECODED["tile_size"], "stage_a": one_of(True, False)},
    "second_pass": {**SAMPLED, **DECODED, "denoise": STAGE["denoise"], "settings": settings},
    "add_lora": {
        "strength": one_of(0, 1, -0.5),
        "text_strength": one_of(0, 1),
        "new_tokens": one_of("", "[a] ^b</w>", "x", "["),
    },
}
FIRST: dict[str, Draw] = {
    "__call__": one_of(
        "a red star", ["a red star", "a blue ring"], "((star:nan)", "[loop] embedding:x", "x" * 3000
    ),
    "prior": one_of("a red star", ["a red star", "a blue ring"], "(a:1e99)"),
    "decode": lambda draw: draw.choice(
        (torch.rand(1, 16, 2, 2), torch.rand(2, 16, 2, 3), torch.rand(1, 16, 1, 40), odd_tensor(draw))
    ),
    "encode": picture,
    "second_pass": picture,
    "add_lora": one_of(
        "demo_lora_house.safetensors",
        "demo_token_loop.safetensors",
        "demo_stage_b.safetensors",
        WEIGHTS,
        Path(),
    ),
}


@pytest.fixture(scope="module")
def cascade():
    with StableCascade.load(WEIGHTS, device="cpu", prior=FEW, decoder=FEW, size=(64, 64)) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(cascade):
    return cascade("a red star", output="tensor")


def check(cascade: StableCascade, seed: int) -> None:
    draw = random.Random(seed)
    name = draw.choice(CALLS)
    # One or two odd arguments at a time: of many, all but the first would go unseen.
    first = FIRST[name](draw)
    names = draw.sample(sorted(NAMED[name]), draw.choice((1, 1, 2, 3)))
    arguments = {argument: NAMED[name][argument](draw) for argument in names}
    try:
        result = getattr(cascade, name)(first, **arguments)
    except Interrupted:
        return
    except CascadeError as error:
        sentence = str(error)
        assert sentence.isprintable(), sentence
        assert sentence.endswith("."), sentence
        assert len(sentence) < 600, sentence
        return
    assert result is not None
    if name == "add_lora":
        cascade.remove_lora(result)


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_a_call_works_or_is_refused_with_a_sentence(cascade, plain, seed):
    check(cascade, seed)
    if seed == SAMPLE - 1:
        # Nothing is left of what was refused.
        assert torch.equal(cascade("a red star", output="tensor"), plain)


@pytest.mark.nightly
def test_many_calls_work_or_are_refused_with_a_sentence(cascade, plain):
    for seed in range(SAMPLE, SEEDS):
        check(cascade, seed)
    assert torch.equal(cascade("a red star", output="tensor"), plain)
