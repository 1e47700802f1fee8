"""One sampling run: what the samplers give from the same start, masks, batches, and bad settings."""

from dataclasses import replace

import pytest
import torch

from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS, add_noise, log_snr_range
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.run import SamplingRun, Stopwatch, by_log_snr, mask_like, sample
from cascade_nodes.tests.core.sampling import sample_from

SHAPE = (4, 6, 5)


def latent(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(3))


def model(x: torch.Tensor, noise_cond: torch.Tensor) -> torch.Tensor:
    return 0.4 * x.roll(1, dims=-1) + noise_cond.view(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_an_empty_latent_it_is_the_sampler_from_its_own_noise(sampler):
    run = SamplingRun(torch.zeros(2, *SHAPE), seed=5, steps=4, shift=2.0, sampler=sampler)
    noise = run.noise()
    expected = sample_from(model, noise.draw(), steps=4, shift=2.0, sampler=sampler, noise=noise.draw)
    assert torch.equal(sample(run, by_log_snr(model)), expected)


def test_from_a_latent_it_starts_at_its_share_of_the_schedule():
    run = SamplingRun(latent(), seed=5, steps=4, shift=2.0, denoise=0.6)
    noise = run.noise()
    start = add_noise(latent(), noise.draw(), 0.6, 2.0)
    expected = sample_from(model, start, steps=4, shift=2.0, sampler="ddpm", noise=noise.draw, t_start=0.6)
    assert torch.equal(sample(run, by_log_snr(model)), expected)
    assert torch.equal(run.log_snrs(), log_snr_range(4, 2.0, 0.6))


def test_outside_the_mask_the_latent_stays_and_inside_it_does_not():
    mask = torch.zeros(1, 6, 5)
    mask[:, 2:4] = 1
    given = latent()
    sampled = sample(SamplingRun(given, steps=3, mask=mask), by_log_snr(model))
    assert torch.equal(sampled[:, :, :2], given[:, :, :2])
    assert torch.equal(sampled[:, :, 4:], given[:, :, 4:])
    assert (sampled[:, :, 2:4] - given[:, :, 2:4]).abs().min() > 0


def test_a_picture_does_not_depend_on_its_batch():
    run = SamplingRun(torch.zeros(3, *SHAPE), seed=9, steps=3)
    together = sample(run, by_log_snr(model))
    for index in range(3):
        alone = replace(run, latent=torch.zeros(1, *SHAPE), batch_index=[index])
        assert torch.equal(sample(alone, by_log_snr(model))[0], together[index])


def test_noise_may_come_from_the_host():
    run = SamplingRun(torch.zeros(2, *SHAPE), seed=5, steps=3)
    draws = iter([latent()] * 4)
    first = sample(run, by_log_snr(model), noise=draws.__next__)
    assert next(draws, None) is None  # the start, and one for each step of ddpm
    assert not torch.equal(first, sample(run, by_log_snr(model)))


def test_the_callback_sees_each_step_and_may_end_the_run():
    steps = []
    run = SamplingRun(torch.zeros(1, *SHAPE), steps=3, sampler="ddim")
    result = sample(run, by_log_snr(model), steps.append)
    assert [step.index for step in steps] == [0, 1, 2]
    assert torch.equal(steps[-1].x, result)

    def stop(step):
        raise KeyError(step.index)

    with pytest.raises(KeyError, match="0"):
        sample(run, by_log_snr(model), stop)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of ddpm, ddim, lcm, dpmpp_2m"),
        ({"steps": 0}, "steps is 0; at least 1 is needed"),
        ({"denoise": 0.0}, "t_start is 0.0"),
        ({"shift": -1.0}, "shift is -1.0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_predicted(changed, message):
    def predict(x, log_snr):
        raise AssertionError("nothing is to be predicted")

    run = replace(SamplingRun(torch.zeros(1, *SHAPE)), **changed)
    with pytest.raises(CascadeError, match=message):
        sample(run, predict)


def test_a_mask_of_any_size_and_batch_fits_the_latent():
    mask = torch.zeros(1, 12, 10)
    mask[:, :6] = 1
    fitted = mask_like(mask, latent(3))
    assert fitted.shape == (3, 1, 6, 5)
    assert torch.equal(fitted[0, 0, :, 0], torch.tensor([1.0, 1, 1, 0, 0, 0]))


def test_the_stopwatch_tells_seconds_and_no_peak_that_is_not_the_runs_own():
    result = Stopwatch(torch.device("cpu")).stop(latent())
    assert torch.equal(result.latent, latent())
    assert result.seconds >= 0
    assert result.device == "cpu"
    assert result.peak_bytes == 0
