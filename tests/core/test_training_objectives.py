"""The objectives by hand: published weights, the schedule's shift, distillation along a path in closed form."""

import math

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.diffusion.guidance import guide
from cascade_nodes.cascade_core.diffusion.loss_weights import AdaptiveLossWeight, p2
from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS
from cascade_nodes.cascade_core.diffusion.schedule import alpha_sigma, log_snr, noise_cond, undiffuse
from cascade_nodes.cascade_core.training.losses import (
    along_path,
    consistency_loss,
    diffusion_loss,
    path_levels,
    pseudo_huber,
    training_noise,
)
from cascade_nodes.cascade_core.training.settings import ObjectiveSettings
from cascade_nodes.tests.core.sampling import sample_from

SIGMA = 0.5  # of data whose every value is drawn from a normal distribution


def level(r):
    """(a, b) of each image's noise condition."""
    return (value.view(-1, 1, 1, 1) for value in alpha_sigma(log_snr(r)))


def ideal(x, r):
    """The noise that the ideal network predicts for such data."""
    a, b = level(r)
    return x * b / (a**2 * SIGMA**2 + b**2)


def end_of_path(x, r):
    """Epsilon of a student that sees where the ideal network's path from x ends.

    The path keeps x's quantile, so it scales with the marginal standard deviation.
    """
    a, b = level(r)
    x0 = x * SIGMA / (a**2 * SIGMA**2 + b**2).sqrt()
    return (x - a * x0) / b


def distilled(student, teacher=ideal, **options):
    torch.manual_seed(0)
    x0 = SIGMA * torch.randn(400, 1, 4, 4)
    return consistency_loss(student, teacher, x0, **options)["loss"].item()


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_end_of_the_path_is_what_distillation_asks_for(shift):
    right, wrong = (distilled(f, solver_steps=100, shift=shift) for f in (end_of_path, ideal))
    assert right < 1e-4
    assert wrong > 10 * right
    coarse = distilled(end_of_path, solver_steps=10, shift=shift)
    assert coarse > 10 * right  # DDIM's error, which finer steps do away with


def test_what_is_learned_for_four_steps_stands_where_their_sampler_does():
    seen = set()

    def student(x, r):
        seen.update(round(value, 2) for value in r.tolist())
        return end_of_path(x, r)

    right = distilled(student, solver_steps=20, student_steps=4)
    # What the network is told of t = 1 and t = 0 is within the schedule's limits; the last is asked for and not used.
    assert seen == {0.99, 0.75, 0.5, 0.25, 0.0}
    wrong = distilled(ideal, solver_steps=20, student_steps=4)
    assert right < 1e-3
    assert wrong > 30 * right
    # This student follows the teacher in one step of first order.
    assert right < 0.2 * distilled(end_of_path, solver_steps=4)


def test_a_share_of_the_batch_comes_from_the_students_own_step():
    def blank(x, r):
        """Sees a picture of zeros wherever it stands, so that from its own step there is nothing but noise."""
        if len(x) == 400:
            seen.append((x.flatten(1).std(dim=1), level(r)))
        return x / next(b for _, b in [level(r)])

    seen = []
    distilled(blank, solver_steps=20, student_steps=4, on_policy_share=0.5)
    spread, (a, b) = seen[-1]
    a, b = a.flatten(), b.flatten()
    later = a > alpha_sigma(log_snr(torch.tensor(0.9)))[0]  # not the first step, which has none before it
    for part, sigma in ((slice(0, 200), SIGMA), (slice(200, 400), 0.0)):
        wanted = (a**2 * sigma**2 + b**2).sqrt()
        assert (spread / wanted)[part][later[part]].mean().item() == pytest.approx(1, abs=0.05)
    assert (spread / b)[:200][later[:200]].mean() > 1.1


def test_a_path_is_followed_as_the_sampler_follows_it():
    """Each image between levels of its own, here all the same ones, and to the clean picture."""
    torch.manual_seed(1)
    x = torch.randn(50, 1, 4, 4)
    levels = log_snr(torch.linspace(1, 0, 7))
    end, last = along_path(ideal, x, path_levels(levels[:, None].expand(-1, 50).unbind()))
    steps = []
    wanted = SAMPLERS["dpmpp_2m"](
        lambda x, level: ideal(x, noise_cond(level)), x, levels, lambda: x, steps.append
    )
    assert (end - wanted).abs().max() < 1e-5
    assert (last - steps[-1].x0).abs().max() < 1e-5


def test_a_student_that_is_asked_for_its_end_draws_the_data_in_one_step():
    torch.manual_seed(1)
    noise = torch.randn(2000, 1, 2, 2)
    options = {"steps": 1, "shift": 1.0, "sampler": "lcm", "noise": lambda: torch.randn(2000, 1, 2, 2)}
    assert sample_from(end_of_path, noise, **options).std().item() == pytest.approx(SIGMA, rel=0.05)
    assert sample_from(ideal, noise, **options).std().item() < 0.1  # one step of the teacher gives the mean


def test_distillation_learns_by_gradient():
    """A scale for each level of noise, learned from the teacher alone."""
    table = torch.nn.Parameter(torch.zeros(11))

    def student(x, r):
        a, b = level(r)
        place = (log_snr(r) / 18.42 + 0.5).clamp(0, 1) * 10
        low = place.floor().long().clamp(max=9)
        share = place - low
        factor = (table[low] * (1 - share) + table[low + 1] * share).exp().view(-1, 1, 1, 1)
        return (x - a * x * SIGMA * factor) / b

    optimiser = torch.optim.Adam([table], lr=0.02)
    torch.manual_seed(2)
    for _ in range(600):
        optimiser.zero_grad()
        consistency_loss(student, ideal, SIGMA * torch.randn(64, 1, 2, 2), solver_steps=20)["loss"].backward()
        optimiser.step()
    noise = torch.randn(2000, 1, 2, 2)
    options = {"shift": 1.0, "noise": lambda: torch.randn(2000, 1, 2, 2)}
    one = sample_from(student, noise, steps=1, sampler="lcm", **options)
    twenty = sample_from(ideal, noise, steps=20, sampler="ddim", **options)
    assert one.std().item() == pytest.approx(twenty.std().item(), rel=0.1)
    assert (one - twenty).abs().mean() < 0.1 * twenty.abs().mean()


def test_a_guided_teacher_moves_the_path():
    def towards(mean):
        def predict(x, r):
            a, b = level(r)
            return (x - a * mean) * b / (a**2 * SIGMA**2 + b**2)

        return predict

    def teacher(x, r):
        return guide(towards(1.0)(x, r), towards(0.0)(x, r), 2.0, 0.0)

    def student(x, r):  # guidance of linear predictions is a prediction again: of mean 2
        a, b = level(r)
        x0 = 2.0 + (x - 2.0 * a) * SIGMA / (a**2 * SIGMA**2 + b**2).sqrt()
        return (x - a * x0) / b

    assert distilled(student, teacher, solver_steps=100) < 0.1 * distilled(
        end_of_path, teacher, solver_steps=100
    )


def test_the_published_objective():
    x0 = torch.randn(30, 4, 3, 3)
    torch.manual_seed(3)
    terms = diffusion_loss(lambda x, r: torch.zeros_like(x), x0, None, 0.0, p2)
    torch.manual_seed(3)
    t = (1 - torch.rand(30)).add(0.001).clamp(0.001, 1.0)
    epsilon = torch.randn_like(x0)
    error = epsilon.square().mean(dim=(1, 2, 3))
    assert terms["loss"].item() == pytest.approx((error / (1 + log_snr(t).exp())).mean().item())


def test_a_shift_above_one_trains_at_more_noise():
    levels = {}
    for shift in (1.0, 2.0):
        seen = {}

        def predict(x, r, seen=seen):
            seen["r"] = r
            return torch.zeros_like(x)

        torch.manual_seed(4)
        diffusion_loss(predict, torch.zeros(100, 1, 1, 1), None, 0.0, p2, shift)
        levels[shift] = log_snr(seen["r"])
    inside = levels[2.0] > -9  # where the schedule's end does not cut it off
    moved = (levels[1.0] - levels[2.0])[inside & (levels[1.0] < 9)]
    assert moved.mean().item() == pytest.approx(2 * math.log(2), rel=0.01)


def test_the_adaptive_weight_learns_from_the_errors():
    weight = AdaptiveLossWeight()
    x0 = torch.randn(64, 2, 2, 2)
    torch.manual_seed(5)
    first = diffusion_loss(lambda x, r: torch.zeros_like(x), x0, None, 0.0, weight)
    assert first["loss"].item() == pytest.approx(first["epsilon"].item())  # all buckets begin at 1
    moved = weight.bucket_losses != 1
    assert 10 < moved.sum() <= 64


def test_epsilon_and_x0_are_one_and_the_same():
    x, r = torch.randn(5, 1, 2, 2), torch.linspace(0.1, 0.9, 5)
    a, b = level(r)
    epsilon = torch.randn_like(x)
    assert torch.allclose(undiffuse(x, log_snr(r), epsilon), (x - b * epsilon) / a, atol=1e-5)


def test_times_within_a_range():
    seen = []

    def predict(x, r):
        seen.append(r)
        return torch.zeros_like(x)

    x0 = torch.zeros(500, 1, 1, 1)
    diffusion_loss(predict, x0, None, 0.0, p2, t_range=(0.25, 0.5))
    limits = noise_cond(log_snr(torch.tensor([0.25, 0.5])))
    assert limits[0] <= seen[0].min() < limits[0] + 0.02
    assert limits[1] - 0.02 < seen[0].max() <= limits[1] + 1e-3


def test_noise_offset_and_multires_noise():
    """The offset is one number for each channel; coarse noise makes neighbours alike and keeps the deviation."""
    x0 = torch.zeros(64, 4, 16, 16)
    torch.manual_seed(0)
    plain = training_noise(x0)
    torch.manual_seed(0)
    assert torch.equal(plain, torch.randn_like(x0))
    torch.manual_seed(0)
    offset = training_noise(x0, offset=0.5) - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert offset[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.15)
    coarse = training_noise(x0, multires=0.8)
    assert torch.allclose(coarse.std(dim=(1, 2, 3)), torch.ones(64), atol=1e-5)

    def alike(noise):
        return (noise[..., 1:] * noise[..., :-1]).mean().item()

    assert abs(alike(plain)) < 0.05
    assert alike(coarse) > 0.3
    assert training_noise(torch.zeros(1, 2, 1, 1), multires=0.8).shape == (1, 2, 1, 1)


def test_huber_is_the_square_of_small_errors_and_the_amount_of_large_ones():
    small, large = torch.tensor([1e-2, -2e-2]), torch.tensor([100.0, -200.0])
    assert torch.allclose(pseudo_huber(small, 1.0), small.square(), rtol=1e-3)
    assert torch.allclose(pseudo_huber(large, 0.1), 0.2 * large.abs(), rtol=2e-3)
    x0 = torch.randn(8, 2, 3, 3)
    torch.manual_seed(1)
    huber = diffusion_loss(lambda x, r: torch.zeros_like(x), x0, None, 0.0, p2, huber=1e4)
    torch.manual_seed(1)
    squared = diffusion_loss(lambda x, r: torch.zeros_like(x), x0, None, 0.0, p2)
    assert huber["epsilon"].item() == pytest.approx(squared["epsilon"].item(), rel=1e-2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"t_range": (0.5, 0.5)}, "two times, the smaller first, are expected"),
        ({"t_range": (0.0, 1.5)}, "must be at least 0 and at most 1"),
        ({"t_range": (0.0, 0.5), "pure_noise_share": 0.1}, "but t_range ends at 0.5"),
        ({"kind": "consistency", "huber": 1.0}, "are of the kind diffusion; leave them out"),
    ],
)
def test_objectives_that_say_nothing_sensible(values, sentence):
    with pytest.raises(CascadeError) as error:
        ObjectiveSettings(**values)
    assert sentence in str(error.value)
