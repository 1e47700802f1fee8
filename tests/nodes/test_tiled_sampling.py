"""Stage B in tiles on the host without ComfyUI, and what leads to large pictures."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts.reporting import reporting_to
from cascade_nodes.nodes.latents import CascadeUpscaleLatent
from cascade_nodes.nodes.sampling import CascadeDecoderSampler
from cascade_nodes.tests.nodes.graph import DECODER, load

WIDTH, HEIGHT = 264, 200  # pixels: 66 × 50 positions


@pytest.fixture(scope="module")
def sockets(models):
    patch = pytest.MonkeyPatch()
    patch.setenv("CASCADE_MODELS", str(models))
    yield load()
    patch.undo()


def decode(sockets, batch=1, seed=3, **changes):
    """Stage B's latent of a random Stage C latent, which is the same for every image of the batch."""
    positive, negative = CascadeTextEncode.execute(sockets["clip"], "a star", "blue").args
    torch.manual_seed(8)
    stage_c = {"samples": torch.randn(1, 16, 5, 7)}
    latent = {"samples": torch.zeros(batch, 4, HEIGHT // 4, WIDTH // 4)}
    latent |= {name: changes.pop(name) for name in ("noise_mask", "samples") if name in changes}
    settings = {**DECODER, "seed": seed, **changes}
    arguments = positive, negative, stage_c, latent
    return CascadeDecoderSampler.execute(sockets["stage_b"], *arguments, **settings)[0]["samples"]


def test_no_tiles_and_one_tile_are_the_whole(sockets):
    whole = decode(sockets)
    assert torch.equal(whole, decode(sockets, tile_size=0))
    assert torch.equal(whole, decode(sockets, tile_size=320))


def test_every_forward_pass_is_as_large_as_a_tile(sockets):
    shapes = []
    network = sockets["stage_b"].network
    hook = network.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        tiled = decode(sockets, tile_size=128, steps=2, cfg=2.0)
    finally:
        hook.remove()
    assert tiled.shape == (1, 4, 50, 66)
    assert max(shape[2] for shape in shapes) == max(shape[3] for shape in shapes) == 32
    assert {shape[0] for shape in shapes} == {2}  # both prompts at once
    rows, columns = (50 - 32 + 15) // 16 + 1, (66 - 32 + 15) // 16 + 1
    assert len(shapes) == 2 * rows * columns  # in each of two steps


def test_tiles_agree_about_the_picture(sockets):
    whole, tiled = decode(sockets), decode(sockets, tile_size=128)
    assert torch.isfinite(tiled).all()
    assert (whole - tiled).abs().max() > 1e-4
    assert (whole - tiled).square().mean() < 0.05 * whole.square().mean()


def test_an_image_in_tiles_does_not_depend_on_its_batch(sockets):
    batch = decode(sockets, batch=2, seed=4, tile_size=128)
    for index in range(2):
        alone = decode(sockets, seed=4 + index, tile_size=128)
        assert (batch[index : index + 1] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_outside_a_mask_tiles_keep_the_latent(sockets):
    samples = torch.randn(1, 4, HEIGHT // 4, WIDTH // 4)
    mask = torch.zeros(1, HEIGHT // 4, WIDTH // 4)
    mask[..., 20:] = 1
    sampled = decode(sockets, samples=samples, noise_mask=mask, denoise=0.6, tile_size=128)
    torch.testing.assert_close(sampled[..., :20], samples[..., :20], rtol=0, atol=1e-6)
    assert (sampled[..., 20:] - samples[..., 20:]).abs().mean() > 0.1


def test_a_run_stops_between_tiles(sockets):
    class Impatient:
        calls = 0

        def step(self, step, total, preview):
            raise AssertionError("no step was finished")

        def notify(self, text):
            raise AssertionError("the sampler has nothing to tell")

        def interrupted(self):
            self.calls += 1
            return self.calls > 3  # before the step, and before each of its tiles

    sink = Impatient()
    with reporting_to(sink), pytest.raises(Interrupted):
        decode(sockets, tile_size=128)
    assert sink.calls == 4


def test_a_tile_too_small_is_refused(sockets):
    with pytest.raises(CascadeError, match="tile_size is 64; give 0 for no tiles, or 128 or more"):
        decode(sockets, tile_size=64)


def test_a_latent_for_a_larger_picture():
    first = {"samples": torch.randn(2, 16, 6, 6), "batch_index": [4, 7]}
    stage_c, stage_b = CascadeUpscaleLatent.execute(first, 640, 384, 42.67).args
    assert stage_c["samples"].shape == (2, 16, 9, 15)
    assert stage_b["samples"].shape == (2, 4, 96, 160)
    assert not stage_b["samples"].any()
    assert stage_c["batch_index"] == stage_b["batch_index"] == [4, 7]
    assert first["samples"].shape == (2, 16, 6, 6)
    flat = CascadeUpscaleLatent.execute({"samples": torch.ones(1, 16, 6, 6)}, 512, 512, 42.67)[0]["samples"]
    torch.testing.assert_close(flat, torch.ones(1, 16, 12, 12))


def test_latents_and_sizes_that_cannot_be_upscaled():
    with pytest.raises(CascadeError, match="Stage C's latent has 16 channels; connect Cascade Prior Sampler"):
        CascadeUpscaleLatent.execute({"samples": torch.zeros(1, 4, 64, 64)}, 512, 512, 42.67)
    with pytest.raises(CascadeError, match="the size is 500 × 512, but each side must be a multiple of 8"):
        CascadeUpscaleLatent.execute({"samples": torch.zeros(1, 16, 6, 6)}, 500, 512, 42.67)
    assert "500 × 512" in str(CascadeUpscaleLatent.validate_inputs(500, 512))
