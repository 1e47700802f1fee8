"""The training loop resumes bit for bit, and the objectives are what they say."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError, StageA, StageB, StageC
from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.diffusion.schedule import log_snr
from cascade_nodes.cascade_core.training.ema import ema_decay, update_ema
from cascade_nodes.cascade_core.training.initialise import initialise_stage_a, initialise_unet
from cascade_nodes.cascade_core.training.losses import contrastive_loss, diffusion_loss, stage_a_loss
from cascade_nodes.cascade_core.training.trainer import Settings, Trainer, learning_rate

STAGE_A = {"c_hidden": 16, "bottleneck_blocks": 1, "codebook_size": 32}
STAGE_C = {
    "c_cond": 16, "c_hidden": [16, 16], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 8, "c_clip_text_pooled": 8, "c_clip_img": 8, "dropout": [0.1, 0.1],
}  # fmt: skip


def tiny_run(folder, bf16, steps=12, **changes):
    """A trainer of a Stage C with dropout, on random latents that only the step decides, and its loss."""
    torch.manual_seed(5)
    network = initialise_unet(StageC.from_config(STAGE_C))
    settings = Settings(
        steps=steps,
        learning_rate=1e-2,
        batch_size=3,
        warmup=4,
        bf16=bf16,
        log_every=4,
        checkpoint_every=5,
        **changes,
    )

    def loss(step):
        condition = torch.randn(3, 2, 8)
        return diffusion_loss(
            lambda x, r: network(x, r, condition, condition[:, :1], condition[:, 1:]),
            torch.randn(3, 16, 4, 4),
        )

    return Trainer({"stage_c": network}, settings, folder), loss


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, bf16):
    whole, loss = tiny_run(tmp_path / "whole", bf16)
    whole.run(loss)

    killed, loss = tiny_run(tmp_path / "killed", bf16)

    def dies_at_eight(step):
        if step == 8:
            raise KeyboardInterrupt
        return loss(step)

    with pytest.raises(KeyboardInterrupt):
        killed.run(dies_at_eight)
    resumed, loss = tiny_run(tmp_path / "killed", bf16)
    assert resumed.resume()
    assert resumed.step == 5  # the last checkpoint
    resumed.run(loss)

    assert same(whole.networks, resumed.networks)
    assert same(whole.average, resumed.average)
    fresh, _ = tiny_run(tmp_path / "fresh", bf16)
    assert not fresh.resume()
    assert not same(whole.networks, fresh.networks)


def test_stopping_and_going_on_changes_nothing(tmp_path):
    whole, loss = tiny_run(tmp_path / "whole", False)
    whole.run(loss)
    parts, loss = tiny_run(tmp_path / "parts", False)
    parts.run(loss, until=3)
    parts.run(loss)
    assert same(whole.average, parts.average)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer, loss = tiny_run(tmp_path, False)
    with pytest.raises(CascadeError, match="loss is nan at step 4; lower the learning rate"):
        trainer.run(lambda step: {"loss": loss(step)["loss"] * math.nan})


def test_learning_rate_warms_up_and_falls():
    settings = Settings(steps=1000, learning_rate=1.0, batch_size=1, warmup=100, final_learning_rate=0.1)
    rates = [learning_rate(step, settings) for step in (0, 49, 99, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_average_warms_up_and_copies_buffers():
    assert [ema_decay(step, 0.999) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.999]
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model.weight.data.fill_(3.0)
    model.get_buffer("running_mean").fill_(7.0)
    update_ema(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.get_buffer("running_mean").tolist() == [7.0, 7.0]


def test_diffusion_loss_weighs_the_error_in_epsilon():
    x0 = torch.randn(40, 4, 3, 3)
    torch.manual_seed(3)
    seen = {}

    def nothing(noised, noise_cond):
        seen["noised"], seen["r"] = noised, noise_cond
        return torch.zeros_like(noised)

    terms = diffusion_loss(nothing, x0, max_loss_weight=5.0, pure_noise_share=0.1)
    torch.manual_seed(3)
    t = (1 - torch.rand(40)).add(0.001).clamp(0.001, 1.0)
    t[:4] = 1.0
    epsilon = torch.randn_like(x0)
    error = epsilon.square().mean(dim=(1, 2, 3))
    weight = debiased(log_snr(t)).clamp(max=5.0)
    assert terms["epsilon"].item() == pytest.approx(error.mean().item())
    assert terms["loss"].item() == pytest.approx((error * weight).mean().item())
    assert seen["r"][:4].tolist() == pytest.approx([seen["r"][0].item()] * 4)
    assert seen["r"][0] > 0.98

    torch.manual_seed(3)
    exact = diffusion_loss(lambda noised, r: epsilon, x0)
    assert exact["loss"].item() == 0


def test_contrastive_loss_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # lengths do not count
    text = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    wrong = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])  # far from the first image, on top of the second
    terms = contrastive_loss(image, text, wrong, torch.tensor(math.log(2.0)))
    e = math.e**2
    images = (-math.log(e / (e + 1 + 1)) - math.log(e / (e + 1 + e))) / 2
    texts = -math.log(e / (e + 1))
    assert terms["loss"].item() == pytest.approx((images + texts) / 2)
    assert terms["right_over_wrong"].item() == 0.5


def test_stage_a_loss_reaches_every_weight():
    torch.manual_seed(0)
    model = initialise_stage_a(StageA.from_config(STAGE_A)).train()
    image = torch.rand(4, 3, 16, 16)
    terms = stage_a_loss(model, image)
    terms["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert terms["loss"].item() > terms["pixels"].item() > 0


def test_stage_a_learns():
    torch.manual_seed(0)
    model = initialise_stage_a(StageA.from_config(STAGE_A)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image = F.interpolate(torch.rand(8, 3, 4, 4), (16, 16), mode="bilinear")
    errors = []
    for _ in range(150):
        terms = stage_a_loss(model, image)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        errors.append(terms["pixels"].item())
    assert errors[-1] < 0.1 * errors[0]


def test_initial_networks_predict_nothing():
    """The output layer starts at zero and each timestep block as the identity, as published."""
    torch.manual_seed(0)
    stage_c = initialise_unet(StageC.from_config(STAGE_C)).eval()
    x, condition = torch.randn(2, 16, 4, 4), torch.randn(2, 1, 8)
    assert stage_c(x, torch.rand(2), condition, condition, condition).abs().max() == 0
    timestep = stage_c.get_submodule("down_blocks.0.1")
    features = torch.randn(2, 16, 4, 4)
    assert torch.equal(timestep(features, torch.randn(2, 192)), features)
    config = {
        "c_hidden": [8, 16], "nhead": [-1, 2], "blocks": [[1, 2], [2, 1]], "block_repeat": [[1, 1], [1, 1]],
        "level_config": ["CT", "CTA"], "c_cond": 8, "c_clip": 8, "dropout": [0, 0],
    }  # fmt: skip
    stage_b = initialise_unet(StageB.from_config(config))
    depth = 3  # blocks on the way down
    weight = stage_b.get_parameter("down_blocks.1.0.channelwise.4.weight")
    bound = math.sqrt(6 / (16 + 64) / depth)
    assert 0.9 * bound < weight.abs().max() <= bound
