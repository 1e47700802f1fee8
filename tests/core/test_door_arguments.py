"""The front door takes what it can mean, and refuses the rest with a sentence before a network is loaded for it."""

import copy
import itertools
import pickle
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import (
    CascadeError,
    Control,
    StableCascade,
    StageProgress,
    StageSettings,
)
from cascade_nodes.cascade_core.geometry import largest_size, stage_c_size
from cascade_nodes.demo.door import WEIGHTS

FEW = StageSettings(steps=2, cfg=2.0, cfg_rescale=0.0)
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
CANNY = "demo_controlnet_canny.safetensors"


@pytest.fixture(scope="module")
def cascade():
    with StableCascade.load(WEIGHTS, device="cpu", prior=FEW, decoder=FEW, size=(64, 64)) as opened:
        yield opened


# Sizes


def test_a_latent_is_decoded_at_its_own_proportions(cascade):
    wide = cascade.prior("a red star", size=(256, 128))
    assert wide.shape == (1, 16, 3, 6)
    assert cascade.decode(wide, output="tensor").shape == (1, 128, 256, 3)
    assert cascade.decode(wide, size=(64, 64), output="tensor").shape == (1, 64, 64, 3)  # as is asked for
    own = cascade.prior("a red star")  # of 64 × 64, as the largest picture with these positions is not
    assert cascade.decode(own, output="tensor").shape == (1, 64, 64, 3)


def test_the_largest_size_has_the_positions_of_its_latent():
    for side in (*range(1, 400), 384 * 42):
        height, width = largest_size((side, 24))
        assert width == 1024
        assert stage_c_size(height, width) == (side, 24)
        assert stage_c_size(height + 8, width)[0] > side


def test_a_latent_of_another_size_is_refused(cascade):
    latent = torch.zeros(1, 16, 3, 6)
    with pytest.raises(
        CascadeError, match="size is 64 × 64, of which Stage C's latent is 2 × 2, but latent is 6 × 3"
    ):
        cascade.prior(latent=latent, size=(64, 64))
    assert cascade.prior(latent=latent, size=(256, 128)).shape == latent.shape


# What is refused


def refused(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(CascadeError) as error:
        call(*arguments, **named)
    sentence = str(error.value)
    assert sentence.isprintable()
    assert sentence.endswith(".")
    assert len(sentence) < 500
    return sentence


@pytest.fixture
def unloaded():
    """A cascade that has loaded nothing, and shall not."""
    cascade = StableCascade.load(WEIGHTS, device="cpu", prior=FEW, decoder=FEW, size=(64, 64))
    yield cascade
    assert not cascade._loaded


NUMBERS = [
    (name, value)
    for name, values in {
        "seed": (-1, 2**64, 10**5000, 1.0, True, "1", np.float32(1), None, [1]),
        "steps": (0, -1, 10_001, 10**30, 2.0, True, np.bool_(True), "2"),
        "cfg": (float("nan"), float("inf"), -1, 101, "4", True, 1j, Fraction(10**400), 10**400),
        "cfg_rescale": (-0.1, 1.1, float("nan")),
        "shift": (0, -1, 21, float("inf")),
        "denoise": (-0.1, 1.1, float("nan"), "1", None),
        "batch": (0, -1, 4097, 1.0, True, 10**30),
        "tile_size": (-1, 1, 127, 16_385, 128.0, True),
        "engine": ("no", None, 1, torch.ones(2)),
        "output": ("jpeg", None, np.array(["pil", "pil"])),
        "size": (64, (64,), (64.0, 64), (0, 64), (65, 64), (-8, 64), (16_392, 64), "64", {}),
        "callback": (3, "print"),
    }.items()
    for value in values
    if value is not None or name in ("seed", "engine", "output", "denoise")
]


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=[str(number) for number in range(len(NUMBERS))])
def test_a_number_out_of_range_is_named(unloaded, name, value):
    assert name in refused(unloaded, "a red star", **{name: value})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is of type NoneType; give text, or a list of texts"),
    ({"prompt": b"a red star"}, "prompt is of type bytes"),
    ({"prompt": []}, "prompt holds no texts"),
    ({"prompt": {"a", "b"}}, "prompt is of type set"),
    ({"prompt": itertools.repeat("a red star")}, "prompt holds more"),
    ({"prompt": "x" * 10**7}, "prompt has 10,000,000 characters; give at most 131,072"),
    ({"prompt": "\ud800"}, "prompt holds"),
    ({"negative": None}, "negative is of type NoneType"),
    ({"negative": "\udcff"}, "negative holds"),
    ({"denoise": 0.5}, "denoise is 0.5, which keeps a part of what it starts from, but nothing was given; give image"),
    ({"denoise": 0}, "denoise is 0, which keeps"),
    ({"image": PICTURE * 255}, "image holds values from 0"),
    ({"image": PICTURE.to("meta")}, "image is a meta tensor"),
    ({"image": torch.zeros(1, 1, 1, 1).expand(1, 2, 20_000, 3)}, "of 20,000 × 2 pixels would be made"),
    ({"image": PICTURE, "mask": torch.ones(3, 64, 64), "batch": 2}, "batch is 2, with 1 prompt, 1 image, 3 masks"),
    ({"image": PICTURE, "room": (-8, 0, 0, 0)}, "room is"),
    ({"image": PICTURE, "room": (True, 0, 0.5, 0)}, "room is"),
    ({"image": PICTURE, "mask": torch.ones(64, 64), "grow": 17}, "grow is 17; give a whole number from 0 to 16"),
    ({"image": PICTURE, "mask": torch.ones(64, 64), "feather": 10**9}, "feather is 1000000000"),
    ({"size": (16384, 16384), "batch": 2}, "2 pictures of 16,384 × 16,384 pixels would be made"),
    ({"prompt": ["a", "b"], "batch": 3}, "batch is 3, with 2 prompts"),
    ({"decoder": StageSettings(0, 1.0)}, "decoder.steps is 0; give a whole number from 1 to 10,000"),
    ({"decoder": StageSettings(1, 1.0, sampler=["ddpm"])}, "decoder.sampler is"),  # pyright: ignore[reportArgumentType]
    ({"decoder": {}}, "decoder is of type dict"),
    ({"controls": [3]}, r"controls[0] is of type int; give Control"),
    ({"controls": [Control(CANNY, PICTURE, strength=float("nan"))]}, "controls[0].strength is nan"),
    ({"controls": [Control(CANNY, PICTURE, strength=-1)]}, "controls[0].strength is -1; give a number from 0 to 10"),
    ({"controls": [Control(CANNY, PICTURE, start="x")]}, "controls[0].start is 'x'"),  # pyright: ignore[reportArgumentType]
    ({"controls": [Control(CANNY, PICTURE), Control(CANNY, PICTURE, low=3, high=2)]}, "[1] has low 3 and high 2"),
    ({"controls": [Control(CANNY, PICTURE * 9)]}, "controls[0].image holds values"),
    ({"controls": [Control(CANNY, hint=PICTURE.to_sparse())]}, "controls[0].hint is a sparse tensor"),
    ({"controls": [Control(CANNY, hint=torch.ones(4, 4, 1).long())]}, "controls[0].hint holds values of torch.int64"),
    ({"controls": [Control(CANNY, hint="x")]}, "controls[0].hint is of type str"),  # pyright: ignore[reportArgumentType]
    ({"controls": [Control(CANNY, PICTURE, reads="big")]}, "controls[0].reads is 'big'; choose small or enlarged"),
    ({"controls": [Control("nowhere.safetensors", PICTURE)]}, "nowhere.safetensors"),
    ({"controls": [Control(3, PICTURE)]}, "is of type int; give a path"),  # pyright: ignore[reportArgumentType]
    ({"image_prompts": [(PICTURE, 11)]}, "The strength of image_prompts[0] is 11; give a number from -10 to 10"),
    ({"image_prompts": ["nowhere.png"]}, "nowhere.png cannot be read"),
    ({"image_prompts": PICTURE}, "image_prompts is of type Tensor; give a list"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(unloaded, arguments, message):
    assert message in refused(unloaded, **{"prompt": "a red star", **arguments})


def test_each_call_names_its_own_arguments(unloaded):
    latent = torch.zeros(1, 16, 2, 2)
    assert refused(unloaded.decode, latent, steps=0).startswith("steps is 0")
    assert refused(unloaded.decode, latent, denoise=0.5).startswith("denoise is 0.5, which keeps")
    assert refused(unloaded.prior, denoise=0.5).endswith("give image or latent.")
    wrong = StageSettings(1, cfg=-1)
    assert refused(unloaded.second_pass, PICTURE, settings=wrong).startswith("settings.cfg is -1")
    assert refused(unloaded.encode, PICTURE, tile_size=64).startswith("tile_size is 64; give 0 for no tiles")
    assert refused(unloaded.encode, PICTURE, stage_a="no").startswith("stage_a is 'no'")
    assert "of 32,000 × 4 pixels" in refused(
        unloaded.second_pass, torch.zeros(1, 1, 1, 1).expand(1, 2, 16000, 3)
    )
    assert "batch is 1, with 2 prompts" in refused(unloaded.decode, latent, ["a", "b"])
    for kind in (latent.to_sparse(), latent.to("meta"), latent.to(torch.complex64), latent[:0]):
        for call in (unloaded.decode, lambda latent: unloaded.prior(latent=latent)):
            assert refused(call, kind).startswith("latent ")
    assert StableCascade.load(WEIGHTS, device="cpu").decode(latent.requires_grad_(), steps=1)


def test_a_wrong_lora_is_named(cascade):
    for strength in (float("nan"), float("inf"), 11, True, "1", None):
        assert refused(cascade.add_lora, "demo_lora_house.safetensors", strength).startswith("strength is")
    assert refused(cascade.add_lora, "demo_lora_house.safetensors", 1, "x").startswith("text_strength is 'x'")
    for file in (
        "nowhere.safetensors",
        "\0",
        "x" * 10**6,
        3,
        None,
        b"x",
        WEIGHTS,
        WEIGHTS / "demo_stage_a.safetensors",
    ):
        refused(cascade.add_lora, file)
    for name in ([], None, "x" * 10**6):
        assert "give the name that add_lora gave" in refused(cascade.remove_lora, name)
    assert cascade.loras == ()


def test_the_thinnest_pictures_steer(cascade):
    """Of 1 × 5000 pixels, whose middle at the latent's proportions is less than a pixel; at no cost of their own."""
    for file in ("demo_controlnet_canny.safetensors", "demo_controlnet_super_resolution.safetensors"):
        for picture in (torch.rand(1, 5000, 3), torch.rand(5000, 1, 3), torch.rand(1, 1, 3)):
            control = Control(file, picture)
            assert cascade.prior("a red star", controls=[control]).shape == (1, 16, 2, 2)


def test_a_stage_of_another_name_is_refused(cascade):
    for kind in ("stage_d", [], None):
        assert refused(cascade.stage, kind).endswith("choose stage_c or stage_b.")


def test_one_lora_twice_counts_twice(cascade):
    twice = [cascade.add_lora("demo_lora_house.safetensors", 0.5) for _ in range(2)]
    assert twice == ["demo_lora_house.safetensors", "demo_lora_house.safetensors (2)"]
    with_both = cascade.prior("a red star")
    for name in twice:
        cascade.remove_lora(name)
    whole = cascade.add_lora("demo_lora_house.safetensors", 1.0)
    assert torch.allclose(with_both, cascade.prior("a red star"), atol=1e-4)
    cascade.remove_lora(whole)


# Numbers of other libraries


def test_numbers_of_other_libraries_are_numbers(cascade):
    plain = cascade.prior("a red star", seed=3, steps=2, cfg=2.0, shift=1.0)
    numbers = {"seed": np.uint64(3), "steps": np.int8(2), "cfg": np.float32(2), "shift": Fraction(1)}
    assert torch.equal(cascade.prior("a red star", **numbers), plain)
    assert torch.equal(cascade.prior("a red star", seed=torch.tensor(3)), plain)


def test_prompts_may_come_from_a_generator(cascade):
    prompts = ["a red star", "a blue ring"]
    both = cascade.prior(prompts)
    assert torch.equal(cascade.prior(text for text in prompts), both)
    assert torch.equal(cascade.prior(np.array(prompts)), both)


# Threads, interrupts, copies


class Stopped(BaseException):
    """Stands in for KeyboardInterrupt, which would end the tests."""


@pytest.mark.parametrize("stop", [Stopped, KeyboardInterrupt, RuntimeError, SystemExit])
def test_what_a_callback_raises_comes_through_and_leaves_no_trace(cascade, stop):
    plain = cascade("a red star", output="tensor")
    lora = cascade.add_lora("demo_lora_house.safetensors")
    changed = cascade("a red star", output="tensor")
    for stage in ("stage_c", "stage_b"):

        def end(progress: StageProgress, stage: str = stage) -> None:
            if progress.stage == stage:
                raise stop

        with pytest.raises(stop):
            cascade("a red star", callback=end, controls=[Control(CANNY, PICTURE)], image_prompts=[PICTURE])
    assert torch.equal(cascade("a red star", output="tensor"), changed)
    cascade.remove_lora(lora)
    assert torch.equal(cascade("a red star", output="tensor"), plain)
    assert not torch.is_inference_mode_enabled()


def test_a_call_within_a_callback_changes_neither(cascade):
    plain, other = cascade("a red star", output="tensor"), cascade("a blue ring", seed=2, output="tensor")
    inner = []

    def call(progress: StageProgress) -> None:
        inner.append(cascade("a blue ring", seed=2, output="tensor"))

    assert torch.equal(cascade("a red star", output="tensor", callback=call), plain)
    assert all(torch.equal(picture, other) for picture in inner)


def in_threads(calls: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_six_threads_with_a_cascade_each_give_the_serial_pictures(cascade):
    expected = [cascade("a red star", seed=seed, output="tensor") for seed in range(6)]

    def one(seed: int) -> torch.Tensor:
        with StableCascade.load(WEIGHTS, device="cpu", prior=FEW, decoder=FEW, size=(64, 64)) as own:
            return own("a red star", seed=seed, output="tensor")

    results = in_threads([lambda seed=seed: one(seed) for seed in range(6)])
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_threads_that_share_a_cascade_give_the_serial_results(cascade):
    def with_lora() -> torch.Tensor:
        return cascade("a red star", seed=1, output="tensor", image_prompts=[PICTURE])

    calls = [
        lambda: cascade("a red star", seed=1, output="tensor"),
        with_lora,
        lambda: cascade.encode(PICTURE, stage_a=True).stage_b,
        lambda: cascade.decode(torch.zeros(1, 16, 2, 2), output="tensor"),
        lambda: cascade.prior("a red star", controls=[Control(CANNY, PICTURE)]),
        lambda: cascade.second_pass(PICTURE, "a red star", output="tensor"),
    ]
    expected = [call() for call in calls]
    assert all(torch.equal(*pair) for pair in zip(in_threads(calls), expected, strict=True))


def test_a_preview_after_the_run_waits_for_its_turn(cascade):
    steps: list[StageProgress] = []
    cascade("a red star", callback=steps.append)
    shown = [np.asarray(step.preview()) for step in steps]
    calls = [
        lambda: cascade("a red star", output="tensor"),
        *(lambda step=step: np.asarray(step.preview()) for step in steps),
    ]
    assert all(np.array_equal(*pair) for pair in zip(in_threads(calls)[1:], shown, strict=True))


def test_a_cascade_is_not_copied_or_sent(cascade):
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(
            CascadeError, match=r"cannot be copied or sent to another process; call StableCascade\.load"
        ):
            spread(cascade)


def test_the_caller_s_tensors_are_not_changed(cascade):
    picture, mask, latent = PICTURE.clone(), torch.ones(64, 64), torch.zeros(1, 16, 2, 2)
    cascade("a red star", image=picture, mask=mask, image_prompts=[picture], controls=[Control(CANNY)])
    cascade.prior(latent=latent, denoise=0)[:] = 1
    assert torch.equal(picture, PICTURE)
    assert torch.equal(mask, torch.ones(64, 64))
    assert not latent.any()


def test_a_pil_picture_keeps_its_orientation_for_its_owner(cascade):
    turned = Image.new("RGB", (64, 128))
    turned.getexif()[0x0112] = 6
    assert cascade.encode(turned).stage_c.shape == (1, 16, 2, 3)
    assert turned.size == (64, 128)
