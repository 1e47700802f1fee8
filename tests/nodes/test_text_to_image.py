"""The whole graph through the node classes, on the headless host, with random weights."""

import pytest
import torch

from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts import headless, host, reporting
from cascade_nodes.nodes.latents import CascadeEmptyLatent
from cascade_nodes.nodes.sampling import SAMPLERS, CascadePriorSampler
from cascade_nodes.tests.nodes.graph import PRIOR, load, text_to_image


@pytest.fixture(scope="module")
def sockets(models):
    patch = pytest.MonkeyPatch()
    patch.setenv("CASCADE_MODELS", str(models))
    yield load()
    patch.undo()


def test_a_prompt_becomes_a_picture(sockets):
    result = text_to_image(sockets)
    assert result["stage_c"].shape == (1, 16, 2, 3)
    assert result["stage_b"].shape == (1, 4, 16, 24)
    assert result["image"].shape == (1, 64, 96, 3)
    assert result["image"].dtype == torch.float32
    assert result["image"].min() >= 0
    assert result["image"].max() <= 1
    assert result["image"].std() > 0.01


def test_both_prompts_are_encoded_in_one_pass(sockets):
    """So that a text encoder whose weights are streamed is read once."""
    passes: list[int] = []
    model = sockets["clip"].encoder.model.text_model
    handle = model.register_forward_hook(lambda _, __, output: passes.append(len(output.last_hidden_state)))
    try:
        CascadeTextEncode.execute(sockets["clip"], "a (red:1.3) star", "a circle")
    finally:
        handle.remove()
    assert passes == [3]  # the positive prompt, the empty one that its weight needs, the negative one


def test_the_seed_alone_decides(sockets):
    first, again = text_to_image(sockets), text_to_image(sockets)
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], text_to_image(sockets, seed=6)["image"])


def test_an_image_does_not_depend_on_its_batch(sockets):
    batch = text_to_image(sockets, batch=3, seed=2**64 - 1)["image"]
    for index, seed in enumerate((2**64 - 1, 0, 1)):
        alone = text_to_image(sockets, seed=seed)["image"]
        torch.testing.assert_close(batch[index : index + 1], alone, rtol=0, atol=1e-5)


def test_batch_index_picks_the_noise(sockets):
    positive, negative = CascadeTextEncode.execute(sockets["clip"], "a star", "").args
    latent = CascadeEmptyLatent.execute(96, 64, 3, 42.67)[0]
    whole = CascadePriorSampler.execute(sockets["stage_c"], positive, negative, latent, seed=9, **PRIOR)[0]
    third = {"samples": latent["samples"][2:], "batch_index": [2]}
    alone = CascadePriorSampler.execute(sockets["stage_c"], positive, negative, third, seed=9, **PRIOR)[0]
    error = (whole["samples"][2:] - alone["samples"]).abs().max() / alone["samples"].abs().max()
    assert error < 1e-5
    assert alone["batch_index"] == [2]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_runs(sockets, sampler):
    latent = text_to_image(sockets, sampler=sampler)["stage_c"]
    assert torch.isfinite(latent).all()


def test_the_prompt_and_the_negative_prompt_count(sockets):
    first = text_to_image(sockets)["stage_c"]
    assert (first - text_to_image(sockets, prompt="a blue circle")["stage_c"]).abs().max() > 1e-3
    assert (first - text_to_image(sockets, negative="large")["stage_c"]).abs().max() > 1e-3


def test_without_guidance_the_negative_prompt_is_not_run(sockets):
    first = text_to_image(sockets, cfg=1.0)["stage_c"]
    assert torch.equal(first, text_to_image(sockets, cfg=1.0, negative="large")["stage_c"])


def test_prompts_of_different_length(sockets):
    long = text_to_image(sockets, prompt="a small red star on " * 30)["stage_c"]
    assert torch.isfinite(long).all()


def test_empty_prompt(sockets):
    assert torch.isfinite(text_to_image(sockets, prompt="", negative="")["image"]).all()


def test_inputs_are_not_written_to(sockets):
    positive, negative = CascadeTextEncode.execute(sockets["clip"], "a star", "").args
    latent = {"samples": torch.randn(2, 16, 2, 3), "noise_mask": torch.rand(1, 64, 96)}
    originals = [latent["samples"].clone(), latent["noise_mask"].clone(), positive[0][0].clone()]
    keys = set(positive[0][1])
    CascadePriorSampler.execute(sockets["stage_c"], positive, negative, latent, seed=1, **PRIOR)
    for tensor, before in zip([*latent.values(), positive[0][0]], originals, strict=True):
        assert torch.equal(tensor, before)
    assert set(positive[0][1]) == keys


def test_denoise_keeps_more_of_the_latent_the_lower_it_is(sockets):
    positive, negative = CascadeTextEncode.execute(sockets["clip"], "a star", "").args
    start_latent = {"samples": torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(3))}
    distances = []
    for denoise in (0.0, 0.1, 0.5, 1.0):
        result = CascadePriorSampler.execute(
            sockets["stage_c"], positive, negative, start_latent, seed=1, **{**PRIOR, "denoise": denoise}
        )[0]
        distances.append((result["samples"] - start_latent["samples"]).norm().item())
    assert distances[0] == 0
    assert distances == sorted(distances)


def test_outside_the_mask_nothing_changes(sockets):
    positive, negative = CascadeTextEncode.execute(sockets["clip"], "a star", "").args
    samples = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 4, 4)
    mask[:, :, 2:] = 1
    latent = {"samples": samples, "noise_mask": mask}
    result = CascadePriorSampler.execute(sockets["stage_c"], positive, negative, latent, seed=1, **PRIOR)[0]
    assert torch.equal(result["samples"][..., :2], samples[..., :2])
    assert (result["samples"][..., 2:] - samples[..., 2:]).abs().mean() > 0.1
    assert torch.equal(result["noise_mask"], mask)


class Watcher:
    """Keeps what a node reports, and stops it when asked."""

    def __init__(self, stop_after: int = 99):
        self.steps: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def step(self, step, total, preview):
        self.steps.append((step, total))

    def notify(self, text):
        raise AssertionError("these nodes have nothing to tell")

    def interrupted(self):
        return len(self.steps) >= self.stop_after


def test_progress_and_interruption(sockets):
    watcher = Watcher()
    with reporting.reporting_to(watcher):
        text_to_image(sockets)
    assert watcher.steps == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 3), (2, 3), (3, 3)]
    watcher = Watcher(stop_after=2)
    with reporting.reporting_to(watcher), pytest.raises(Interrupted):
        text_to_image(sockets)
    assert watcher.steps == [(1, 4), (2, 4)]


def test_without_comfyui_the_host_is_headless():
    assert host() is headless
