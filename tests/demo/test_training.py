"""The demo's networks train by the core's loop: killed runs resume bit for bit; losses and initial weights by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError, StageA, StageB, StageC
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.log import LOG
from cascade_nodes.cascade_core.training.loop import Loop
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.training.settings import OutputSettings, TrainSettings
from cascade_nodes.demo.initialise import initialise_stage_a, initialise_unet
from cascade_nodes.demo.losses import (
    FRAME_WEIGHT,
    contrastive_loss,
    differences_error,
    frame_weights,
    stage_a_loss,
)
from cascade_nodes.demo.network_task import Batch, NetworkTask, RunSettings, Steps
from cascade_nodes.demo.train import STAGES, main

STAGE_A = {"c_hidden": 16, "bottleneck_blocks": 1, "codebook_size": 32}
STAGE_C = {
    "c_cond": 16, "c_hidden": [16, 16], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 8, "c_clip_text_pooled": 8, "c_clip_img": 8, "dropout": [0.1, 0.1],
}  # fmt: skip


def tiny_run(folder, bf16, steps=12):
    """A loop that trains a Stage C with dropout on random latents."""
    torch.manual_seed(5)
    network = initialise_unet(StageC.from_config(STAGE_C))
    latents, conditions = torch.randn(20, 16, 4, 4), torch.randn(20, 2, 8)
    train = TrainSettings(
        steps=steps, learning_rate=1e-2, batch_size=3, warmup=4, final_learning_rate=0.02, deterministic=False
    )
    settings = RunSettings(train, OutputSettings("", str(folder), log_every=4, checkpoint_every=5))

    def draw(step):
        rows = torch.randint(20, (3,))
        return Batch([latents[rows], conditions[rows]])

    def loss(latents, condition):
        return diffusion_loss(
            lambda x, r: network(x, r, condition, condition[:, :1], condition[:, 1:]), latents
        )

    task = NetworkTask({"stage_c": network}, draw, loss, bf16)
    return Loop(task, Steps(), settings, build_accelerator())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights(loop):
    return loop.task.trained.state_dict()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, bf16):
    whole = tiny_run(tmp_path / "whole", bf16)
    whole.run()

    killed = tiny_run(tmp_path / "killed", bf16)
    loss = killed.task.loss

    def dies_at_eight(inputs):
        if killed.step == 8:
            raise KeyboardInterrupt
        return loss(inputs)

    killed.task.loss = dies_at_eight
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = tiny_run(tmp_path / "killed", bf16)
    assert resumed.resume()
    assert resumed.step == 5  # the last checkpoint
    resumed.run()

    assert same(weights(whole), weights(resumed))
    assert same(whole.state, resumed.state)
    fresh = tiny_run(tmp_path / "fresh", bf16)
    assert not fresh.resume()
    assert not same(weights(whole), weights(fresh))


def test_stopping_and_going_on_changes_nothing(tmp_path):
    whole = tiny_run(tmp_path / "whole", False)
    whole.run()
    parts = tiny_run(tmp_path / "parts", False)
    parts.stop = lambda: parts.step == 3
    assert not parts.run().finished
    assert parts.step == 3
    parts.run()
    assert same(whole.state, parts.state)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    loop = tiny_run(tmp_path, False)
    loss = loop.task.loss
    loop.task.loss = lambda inputs: {"loss": loss(inputs)["loss"] * math.nan}
    with pytest.raises(CascadeError, match=r"loss is nan at step 4, so the run has diverged"):
        loop.run()


def test_a_run_leaves_its_log(tmp_path):
    loop = tiny_run(tmp_path, False)
    seen = []
    loop.report = seen.append
    loop.run()
    assert [progress.step for progress in seen] == [4, 8, 12]
    assert all(progress.terms.keys() == {"loss", "epsilon"} for progress in seen)
    assert len((tmp_path / LOG).read_text().splitlines()) == 3


def test_where_a_run_cannot_write_is_found_before_it_begins(tmp_path, monkeypatch):
    def begin(job):
        raise AssertionError("it began")

    monkeypatch.setitem(STAGES, "stage_a", begin)
    (tmp_path / "file").write_bytes(b"")
    for options in (["--work", "file"], ["--out", "file", "--work", "."]):
        places = [str(tmp_path / option) if option in ("file", ".") else option for option in options]
        with pytest.raises(CascadeError, match=r"could not be written \(Not a directory\)"):
            main(["stage_a", *places])
    with pytest.raises(AssertionError, match="it began"):
        main(["stage_a", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
    terms = stage_a_loss(model, image, 0.05 * torch.randn(len(image), 4, 4, 4))
    terms["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert terms["loss"].item() > terms["pixels"].item() > 0


def test_stage_a_is_held_to_the_frame_and_to_differences():
    weights = frame_weights((16, 12), torch.device("cpu"))
    assert weights.shape == (1, 1, 16, 12)
    assert weights[0, 0, 8, 6] == 1
    assert weights[0, 0, 0, 6] == weights[0, 0, 8, -1] == FRAME_WEIGHT
    assert weights[0, 0, 0, 0] == FRAME_WEIGHT**2
    flat, step = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 0.5  # one of three differences across, in every row
    one = torch.ones(1, 1, 4, 4)
    assert differences_error(flat + 0.5, flat, one).item() == 0
    assert differences_error(step, flat, one).item() == pytest.approx(0.25 / 3)


def test_stage_a_learns():
    torch.manual_seed(0)
    model = initialise_stage_a(StageA.from_config(STAGE_A)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image = F.interpolate(torch.rand(8, 3, 4, 4), (16, 16), mode="bilinear")
    errors = []
    for _ in range(150):
        terms = stage_a_loss(model, image, 0.05 * torch.randn(len(image), 4, 4, 4))
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
