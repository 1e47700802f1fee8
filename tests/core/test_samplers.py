"""Samplers: the order of each method, starting from a latent, edges and bad arguments."""

import math
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.diffusion.forward_process import diffuse
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.cascade_core.diffusion.samplers import (
    SAMPLERS,
    SamplerStep,
    add_noise,
    log_snr_range,
)
from cascade_nodes.cascade_core.diffusion.schedule import alpha_sigma, log_snr, noise_cond
from cascade_nodes.cascade_core.training.settings import OutputSettings
from cascade_nodes.tests.core.sampling import sample_from

SHAPE = (16, 6, 8)


def normal(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()


# Targets whose epsilon is known exactly: x0 ~ N(MEAN, deviation²)

MEAN = 0.7


def gaussian(deviation: float = 0.4):
    def epsilon(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """E[epsilon | x]"""
        a, b = (value.view(-1, 1, 1, 1) for value in alpha_sigma(level.to(x.device)))
        return b * (x - a * MEAN) / (a**2 * deviation**2 + b**2)

    return epsilon


def flow(x: torch.Tensor, start: torch.Tensor, end: torch.Tensor, deviation: float) -> torch.Tensor:
    """Where the probability-flow ODE takes x: it keeps the distance to the mean in standard deviations."""
    (a, b), (a_end, b_end) = alpha_sigma(start), alpha_sigma(end)
    spread = ((a_end**2 * deviation**2 + b_end**2) / (a**2 * deviation**2 + b**2)).sqrt()
    return a_end * MEAN + spread * (x - a * MEAN)


def no_noise() -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def flow_error(sampler: str, steps: int, deviation: float) -> float:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    levels = log_snr(torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
    end = SAMPLERS[sampler](gaussian(deviation), x, levels, no_noise, None)
    return (end - flow(x, levels[0], levels[-1], deviation)).abs().max().item()


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.0])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_error_falls_with_the_order_of_the_method(sampler, order, deviation):
    errors = [flow_error(sampler, steps, deviation) for steps in (40, 80, 160, 320)]
    falls = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert falls == pytest.approx([order] * 3, abs=0.12)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 2.0])
def test_second_order_is_closer_at_the_usual_number_of_steps(deviation):
    assert flow_error("dpmpp_2m", 20, deviation) < 0.25 * flow_error("ddim", 20, deviation)


def test_dpmpp_2m_is_ddim_where_it_is_of_first_order():
    x, levels = normal(2), log_snr_range(2, 2.0)  # two steps: a first and a last
    runs = [SAMPLERS[name](gaussian(), x, levels, no_noise, None) for name in ("dpmpp_2m", "ddim")]
    assert relative(*runs) <= 1e-5


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_samples_are_those_of_the_target(sampler):
    noise = NoiseSource(0, 1, (1, 200, 200))
    end = SAMPLERS[sampler](gaussian(0.4), noise.draw(), log_snr_range(200, 1.0), noise.draw, None)
    assert end.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert end.std().item() == pytest.approx(0.4, abs=0.02)


def test_lcm_renoises_each_prediction():
    noise, levels = NoiseSource(0, 1, (1, 200, 200)), log_snr_range(6, 1.0)
    end = SAMPLERS["lcm"](gaussian(0.4), noise.draw(), levels, noise.draw, None)
    spread = 1.0  # the deviation of x, step by step: E[x0 | x] keeps a fixed share of it
    for level, following in pairwise(levels):
        (a, b), (a_next, b_next) = alpha_sigma(level), alpha_sigma(following)
        predicted = spread * a * 0.4**2 / (a**2 * 0.4**2 + b**2)
        spread = ((a_next * predicted) ** 2 + b_next**2).sqrt().item()
    assert end.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert end.std().item() == pytest.approx(spread, rel=0.02)


# Starting from a latent


def test_add_noise_is_diffuse_at_t_start():
    latent, noise = normal(2), normal(2, seed=1)
    expected = diffuse(latent, noise, torch.tensor([0.6, 0.6]), shift=2.0).noised
    assert torch.equal(add_noise(latent, noise, 0.6, 2.0), expected)


def test_add_noise_of_an_empty_latent_is_the_noise():
    noise = normal(2)
    assert torch.equal(add_noise(torch.zeros(2, *SHAPE), noise, 1.0, 2.0), noise)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ddpm"])
def test_a_true_epsilon_leads_back_to_the_latent(sampler):
    latent, noise = normal(1), normal(1, seed=1)

    def true_epsilon(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        level = level_of[round(r[0].item(), 5)]
        a, b = alpha_sigma(level)
        return (x - a * latent) / b

    levels = log_snr_range(8, 2.0, t_start=0.7)
    level_of = {round(noise_cond(level).item(), 5): level for level in levels}
    start = add_noise(latent, noise, 0.7, 2.0)
    fresh = NoiseSource(0, 1, SHAPE)
    steps: list[SamplerStep] = []
    sample_from(
        true_epsilon,
        start,
        steps=8,
        shift=2.0,
        sampler=sampler,
        noise=fresh.draw,
        t_start=0.7,
        callback=steps.append,
    )
    for step in steps:
        assert relative(step.x0, latent) <= 1e-4
        assert step.log_snr == levels[step.index + 1].item()


# Edges


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_wait_for_no_device(sampler):
    """On the meta device nothing can be read back, which on a GPU would wait for it."""
    noise, levels, steps = NoiseSource(0, 2, SHAPE), log_snr_range(4, 2.0), []
    end = SAMPLERS[sampler](gaussian(), noise.draw().to("meta"), levels, noise.draw, steps.append)
    assert end.device.type == steps[0].x0.device.type == "meta"
    assert [step.log_snr for step in steps] == levels[1:].tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 50.0, 0.02])
def test_repeated_levels_leave_no_nan(sampler, shift):
    levels = log_snr_range(300, shift)
    assert (levels.diff() == 0).any()  # cut off at the schedule's limits
    noise = NoiseSource(0, 1, SHAPE)
    end = SAMPLERS[sampler](gaussian(), noise.draw(), levels, noise.draw, None)
    assert end.isfinite().all()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_repeated_level_changes_nothing(sampler):
    levels = log_snr_range(10, 1.0)
    longer = levels.repeat_interleave(torch.tensor([3, 1, 1, 1, 2, 1, 3, 1, 1, 1, 1]))
    x = normal(1)
    zeros = torch.zeros_like(x)
    runs = [SAMPLERS[sampler](gaussian(), x, levels_, lambda: zeros, None) for levels_ in (levels, longer)]
    assert relative(*runs) <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_infinite_last_level_ends_at_the_prediction(sampler):
    """A host's list of sigmas ends in 0."""
    levels = torch.cat([log_snr_range(4, 1.0)[:-1], torch.tensor([math.inf])])
    noise, steps = NoiseSource(0, 1, SHAPE), []
    end = SAMPLERS[sampler](gaussian(), noise.draw(), levels, noise.draw, steps.append)
    assert torch.equal(end, steps[-1].x0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_bf16_model_leaves_the_latent_in_float32(sampler):
    def run(start: torch.Tensor) -> list[SamplerStep]:
        noise, steps = NoiseSource(0, 2, SHAPE), []
        SAMPLERS[sampler](bf16_model, start, log_snr_range(3, 1.0), noise.draw, steps.append)
        return steps

    def bf16_model(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return gaussian()(x, level).bfloat16()

    start = normal(2).bfloat16()
    for rounded, exact in zip(run(start), run(start.float()), strict=True):
        assert rounded.x.dtype == rounded.x0.dtype == torch.float32
        assert torch.equal(rounded.x, exact.x)
    assert torch.equal(start, normal(2).bfloat16())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_keep_their_inputs_and_report_every_step(sampler):
    noise = NoiseSource(0, 2, SHAPE)
    start, levels = noise.draw(), log_snr_range(4, 2.0)
    copies = start.clone(), levels.clone()
    steps: list[SamplerStep] = []
    SAMPLERS[sampler](gaussian(), start, levels, noise.draw, steps.append)
    assert torch.equal(start, copies[0])
    assert torch.equal(levels, copies[1])
    assert [(step.index, step.steps) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.log_snr for step in steps] == levels[1:].tolist()


@pytest.mark.parametrize(("sampler", "draws"), [("ddpm", 4), ("lcm", 4), ("ddim", 0), ("dpmpp_2m", 0)])
def test_stochastic_samplers_draw_once_a_step(sampler, draws):
    source, drawn = NoiseSource(0, 1, SHAPE), []

    def counted() -> torch.Tensor:
        drawn.append(source.draw())
        return drawn[-1]

    SAMPLERS[sampler](gaussian(), torch.zeros(1, *SHAPE), log_snr_range(4, 1.0), counted, None)
    assert len(drawn) == draws


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_raising_in_the_callback_ends_the_run(sampler):
    seen: list[int] = []
    noise = NoiseSource(0, 1, SHAPE)
    start = noise.draw()
    copy = start.clone()

    def interrupt(step: SamplerStep) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        sample_from(
            lambda x, r: x, start, steps=5, shift=1.0, sampler=sampler, noise=noise.draw, callback=interrupt
        )
    assert seen == [0, 1]
    assert torch.equal(start, copy)
    assert torch.is_grad_enabled()


# Bad arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; at least 1"),
        ({"steps": -3}, "steps is -3"),
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of ddpm, ddim, lcm, dpmpp_2m"),
        ({"t_start": 0.0}, "t_start is 0.0; it must be above 0 and at most 1"),
        ({"t_start": 1.01}, "t_start is 1.01"),
        ({"t_start": math.nan}, "t_start is nan"),
        ({"t_start": 0.5, "t_end": 0.5}, "t_end is 0.5; .* below t_start"),
        ({"t_end": -0.1}, "t_end is -0.1"),
        ({"shift": 0.0}, "shift is 0.0; it must be a finite number above 0"),
        ({"shift": math.inf}, "shift is inf"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    noise = NoiseSource(0, 1, SHAPE)
    arguments = {"steps": 2, "shift": 1.0, "sampler": "ddpm", "noise": noise.draw} | changes
    with pytest.raises(CascadeError, match=message):
        sample_from(lambda x, r: x, noise.draw(), **arguments)


def test_noise_of_another_shape_is_refused():
    noise = NoiseSource(0, 1, SHAPE)  # would broadcast over a batch of two
    with pytest.raises(CascadeError, match=r"noise has shape \(1, 16, 6, 8\).*\(2, 16, 6, 8\)"):
        sample_from(
            lambda x, r: x, torch.zeros(2, *SHAPE), steps=2, shift=1.0, sampler="lcm", noise=noise.draw
        )
    with pytest.raises(CascadeError, match="noise has shape"):
        add_noise(torch.zeros(2, *SHAPE), noise.draw(), 0.5, 1.0)


def test_the_samples_of_a_training_may_use_each_of_them():
    assert get_args(get_type_hints(OutputSettings)["sample_sampler"]) == tuple(SAMPLERS)
