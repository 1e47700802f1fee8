"""Schedule, scaler, noise condition, noising and loss weights against the published code's numbers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade_nodes.cascade_core.diffusion import loss_weights
from cascade_nodes.cascade_core.diffusion.forward_process import diffuse, random_t
from cascade_nodes.cascade_core.diffusion.loss_weights import AdaptiveLossWeight
from cascade_nodes.cascade_core.diffusion.schedule import (
    alpha_sigma,
    log_snr,
    log_snr_limits,
    noise_cond,
    undiffuse,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "diffusion.safetensors")
LOG_SNR = GOLDEN["in.log_snr"]


def assert_golden(value: torch.Tensor, name: str, tolerance: float = 1e-5) -> None:
    reference = GOLDEN[name]
    assert value.shape == reference.shape
    assert value.dtype == torch.float32
    assert (value - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_schedule_and_noise_cond_as_published(shift):
    level = log_snr(GOLDEN["in.t"], shift=shift)
    assert_golden(level, f"out.log_snr.shift{shift}")
    assert_golden(noise_cond(level), f"out.noise_cond.shift{shift}")


def test_alpha_sigma_as_published():
    a, b = alpha_sigma(LOG_SNR)
    assert_golden(a, "out.a")
    assert_golden(b, "out.b")


def test_diffuse_as_published():
    made = diffuse(GOLDEN["in.x0"], GOLDEN["in.epsilon"], GOLDEN["in.t3"], shift=2.0)
    assert_golden(made.noised, "out.noised")
    assert_golden(made.target, "out.target")
    assert_golden(made.log_snr, "out.noised.log_snr")
    assert_golden(made.noise_cond, "out.noised.noise_cond")
    assert_golden(made.loss_weight, "out.noised.loss_weight")
    assert torch.equal(made.epsilon, GOLDEN["in.epsilon"])


def test_loss_weights_as_published():
    assert_golden(loss_weights.p2(LOG_SNR), "out.p2")
    assert_golden(loss_weights.x0_min_snr(LOG_SNR), "out.min_snr")
    adaptive = AdaptiveLossWeight()
    adaptive.update_buckets(LOG_SNR, GOLDEN["in.adaptive.loss"])
    assert_golden(adaptive(LOG_SNR), "out.adaptive")


def test_every_golden_tensor_is_used():
    outputs = {name for name in GOLDEN if name.startswith("out.")}
    schedule = {f"out.{kind}.shift{shift}" for kind in ("log_snr", "noise_cond") for shift in (1, 2, 4)}
    noised = {
        "out.noised",
        "out.target",
        "out.noised.log_snr",
        "out.noised.noise_cond",
        "out.noised.loss_weight",
    }
    assert outputs == schedule | noised | {"out.a", "out.b", "out.p2", "out.min_snr", "out.adaptive"}


def test_schedule_stays_within_its_limits_whatever_the_shift():
    lowest, highest = log_snr_limits()
    assert (lowest, highest) == pytest.approx((-math.log(9999), math.log(9999)), rel=1e-4)
    t = torch.linspace(-0.5, 1.5, 101)  # outside [0, 1] counts as the nearer end
    for shift in (0.01, 0.5, 1.0, 2.0, 100.0):
        level = log_snr(t, shift)
        assert level.min() >= lowest
        assert level.max() <= highest
        assert (level.diff() <= 0).all()
        assert noise_cond(level).isfinite().all()


def test_shift_moves_log_snr_by_twice_its_log():
    t = torch.linspace(0.2, 0.8, 7)
    assert torch.allclose(log_snr(t, 2.0), log_snr(t) - 2 * math.log(2), atol=1e-6)
    assert torch.allclose(noise_cond(log_snr(t, 2.0), shift=2.0), t, atol=1e-5)
    assert torch.allclose(noise_cond(log_snr(t)), t, atol=1e-5)


def test_alpha_sigma_preserves_variance_and_means_its_log_snr():
    level = torch.linspace(-9.2, 9.2, 50, dtype=torch.float64)
    a, b = alpha_sigma(level)
    assert torch.allclose(a**2 + b**2, torch.ones_like(a))
    assert torch.allclose((a**2 / b**2).log(), level)


def test_undiffuse_is_the_inverse_of_diffuse():
    x0, epsilon = GOLDEN["in.x0"], GOLDEN["in.epsilon"]
    made = diffuse(x0, epsilon, GOLDEN["in.t3"])
    assert torch.allclose(undiffuse(made.noised, made.log_snr, epsilon), x0, atol=1e-5)
    one = diffuse(x0[:1], epsilon[:1], torch.tensor([0.5]))
    assert torch.allclose(undiffuse(one.noised, one.log_snr[0], epsilon[:1]), x0[:1], atol=1e-6)


def test_half_precision_is_computed_in_float32():
    x0, epsilon = GOLDEN["in.x0"].bfloat16(), GOLDEN["in.epsilon"].bfloat16()
    made = diffuse(x0, epsilon, GOLDEN["in.t3"])
    assert torch.equal(made.noised, diffuse(x0.float(), epsilon.float(), GOLDEN["in.t3"]).noised)
    assert made.noised.dtype == torch.float32
    assert undiffuse(x0, made.log_snr, epsilon).dtype == torch.float32
    assert noise_cond(LOG_SNR.bfloat16()).dtype == torch.float32


def test_random_t_covers_the_published_range():
    t = random_t(10_000, torch.Generator().manual_seed(0))
    assert t.shape == (10_000,)
    assert 0.001 <= t.min() < 0.01
    assert 0.99 < t.max() <= 1.0
    assert t.mean() == pytest.approx(0.5, abs=0.02)


SNR = 3.0
WEIGHTS = [
    (loss_weights.constant, {}, 1.0),
    (loss_weights.constant, {"value": 2.5}, 2.5),
    (loss_weights.x0_snr, {}, SNR),
    (loss_weights.p2, {}, 1 / (1 + SNR)),
    (loss_weights.p2, {"k": 2.0, "gamma": 0.5, "s": 2.0}, (2 + SNR**2) ** -0.5),
    (loss_weights.x0_snr_plus_one, {}, SNR + 1),
    (loss_weights.x0_min_snr, {}, SNR),
    (loss_weights.x0_min_snr, {"max_snr": 2.0}, 2.0),
    (loss_weights.x0_min_snr_plus_one, {}, SNR + 1),
    (loss_weights.x0_min_snr_plus_one, {"max_snr": 3.5}, 3.5),
    (loss_weights.x0_truncated_snr, {}, SNR),
    (loss_weights.x0_truncated_snr, {"min_snr": 4.0}, 4.0),
    (loss_weights.sech, {}, 2 / (SNR**0.5 + SNR**-0.5)),
    (loss_weights.sech, {"div": 1.0}, 2 / (SNR + 1 / SNR)),
    (loss_weights.min_snr_gamma, {}, 1.0),
    (loss_weights.min_snr_gamma, {"gamma": 2.0}, 2.0 / SNR),
    (loss_weights.debiased, {}, SNR**-0.5),
    (loss_weights.x0_sigmoid, {}, SNR / (1 + SNR)),
    (loss_weights.x0_sigmoid, {"s": 2.0}, SNR**2 / (1 + SNR**2)),
]


@pytest.mark.parametrize(("weight", "parameters", "expected"), WEIGHTS)
def test_loss_weight_by_its_formula(weight, parameters, expected):
    level = torch.tensor([math.log(SNR)])
    assert weight(level, **parameters).item() == pytest.approx(expected, rel=1e-5)
    shifted = level - 2 * math.log(4)  # of a schedule with shift 4, undone by the weight's own
    assert weight(shifted, shift=4.0, **parameters).item() == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_the_error_in_x0_is_another_of_that_in_epsilon():
    """The arithmetic of the module's docstring, on one latent with a wrong prediction."""
    x0, epsilon, wrong = (torch.randn(1, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    for snr in (1e-3, 0.5, 3.0, 20.0, 500.0):
        level = torch.tensor([math.log(snr)], dtype=torch.float64)
        a, b = (value.item() for value in alpha_sigma(level))
        x = a * x0 + b * epsilon
        x0_wrong = (x - b * wrong) / a
        v, v_wrong = a * epsilon - b * x0, a * wrong - b * x0_wrong
        in_epsilon, in_x0, in_v = (
            (left - right).square().sum().item()
            for left, right in ((epsilon, wrong), (x0, x0_wrong), (v, v_wrong))
        )
        assert in_x0 == pytest.approx(in_epsilon / snr)
        assert in_v == pytest.approx(in_epsilon * (snr + 1) / snr)
        gamma = loss_weights.min_snr_gamma(level).item() * in_epsilon
        assert gamma == pytest.approx(loss_weights.x0_min_snr(level).item() * in_x0)
        assert loss_weights.x0_snr_plus_one(level).item() * in_x0 == pytest.approx(in_v)
        assert loss_weights.x0_sigmoid(level).item() * in_x0 == pytest.approx(
            loss_weights.p2(level).item() * in_epsilon
        )


def test_diffuse_hands_its_loss_shift_to_the_loss_weight():
    x0, epsilon, t = GOLDEN["in.x0"], GOLDEN["in.epsilon"], GOLDEN["in.t3"]
    made = diffuse(x0, epsilon, t, loss_weight=loss_weights.x0_min_snr, loss_shift=2.0)
    assert torch.equal(made.loss_weight, loss_weights.x0_min_snr(made.log_snr, shift=2.0))


def test_adaptive_weight_moves_only_the_buckets_hit():
    adaptive = AdaptiveLossWeight(buckets=10)
    losses = adaptive.bucket_losses.clone()
    adaptive.update_buckets(torch.tensor([-100.0, 0.1, 0.1]), torch.tensor([3.0, 1.0, 5.0]), beta=0.9)
    hit = adaptive.bucket_losses != losses
    assert hit.sum() == 2
    assert adaptive.bucket_losses[hit].tolist() == pytest.approx([0.9 + 0.3, 0.9 + 0.3])
    assert adaptive(torch.tensor([0.1])).item() == pytest.approx(1 / 1.2)
    assert adaptive(torch.tensor([100.0])).item() == 1.0


def test_adaptive_weight_is_bounded_and_resumes():
    adaptive = AdaptiveLossWeight(weight_range=(0.5, 2.0))
    adaptive.update_buckets(torch.tensor([-5.0, 5.0]), torch.tensor([1e6, 0.0]), beta=0.0)
    assert adaptive(torch.tensor([-5.0, 5.0])).tolist() == [0.5, 2.0]
    resumed = AdaptiveLossWeight(weight_range=(0.5, 2.0))
    resumed.load_state_dict(adaptive.state_dict())
    assert torch.equal(resumed(LOG_SNR), adaptive(LOG_SNR))
