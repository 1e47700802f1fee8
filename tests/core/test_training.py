"""The learning rate, the average of the weights, and the diffusion loss."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from cascade_nodes.cascade_core.diffusion.loss_weights import debiased
from cascade_nodes.cascade_core.diffusion.schedule import log_snr
from cascade_nodes.cascade_core.training.ema import EMA, ema_decay
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.training.optimisers import learning_rate
from cascade_nodes.cascade_core.training.settings import TrainSettings


def test_learning_rate_warms_up_and_falls():
    settings = TrainSettings(steps=1000, learning_rate=1.0, warmup=100, final_learning_rate=0.1)
    rates = [learning_rate(step, settings) for step in (0, 49, 99, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.55, 0.1])
    settings = TrainSettings(steps=1000, learning_rate=1.0, warmup=100)
    assert [learning_rate(step, settings) for step in (550, 1000)] == pytest.approx([0.5, 0.0])


def test_average_warms_up_and_copies_what_it_is_told():
    assert [ema_decay(step, 0.999) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.999]
    model = nn.BatchNorm1d(2)
    averaged = EMA(model.state_dict(), 0.75)
    copying = EMA(model.state_dict(), 0.75, copied=dict(model.named_buffers()))
    model.weight.data.fill_(3.0)
    model.get_buffer("running_mean").fill_(8.0)
    model.get_buffer("num_batches_tracked").fill_(7)
    for average, mean in ((averaged, 2.0), (copying, 8.0)):
        average.update(model.state_dict(), 100)
        assert average.tensors["weight"].tolist() == [1.5, 1.5]
        assert average.tensors["running_mean"].tolist() == [mean, mean]
        assert average.tensors["num_batches_tracked"].item() == 7


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


def test_reading_settings_loads_neither_torch_nor_an_image_library():
    code = (
        "import sys, cascade_nodes.cascade_core.training.settings; "
        "print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
