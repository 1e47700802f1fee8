"""The headless host on a device of little memory, played by main memory: the same pictures, and a word where it was
too little.
"""

from itertools import count

import pytest
import torch

from cascade_nodes.cascade_core.errors import Interrupted
from cascade_nodes.cascade_core.placement import DeviceMemory
from cascade_nodes.cascade_core.stages import tiled
from cascade_nodes.cascade_core.stages.diffusion import DiffusionStage
from cascade_nodes.nodes.hosts import reporting
from cascade_nodes.nodes.hosts.headless.device import compute_device
from cascade_nodes.nodes.hosts.headless.vae import decode_latent, encode_pixels
from cascade_nodes.tests.core.placements import Counting, Late
from cascade_nodes.tests.nodes.graph import load, text_to_image

WORKING = 200_000  # bytes: what a forward of the tiny cascade is taken to need


class Told(reporting.Sink):
    """Keeps what is said, and asks to stop when it has been asked so often."""

    def __init__(self, stop_after: int = -1):
        self.said: list[str] = []
        self.left = stop_after

    def step(self, step, total, preview):
        pass

    def notify(self, text):
        self.said.append(text)

    def interrupted(self):
        self.left -= 1
        return self.left == -1


@pytest.fixture
def sockets(tiny):
    return load()


@pytest.fixture
def plain(sockets):
    """The picture without any pool."""
    return text_to_image(sockets)["image"]


@pytest.fixture
def on(monkeypatch):
    """Returns on(device), which sets the host's device from then on."""

    def use(device):
        pool = DeviceMemory(device, unit_bytes=8_000)
        monkeypatch.setattr(compute_device(), "pool", pool)
        monkeypatch.setattr(DiffusionStage, "_workspace_bytes", lambda *_: WORKING)
        return pool

    return use


def weights(sockets) -> int:
    pairs = [pair for socket in sockets.values() for pair in socket.networks()]
    networks = {id(network): network for network, _ in pairs}
    return sum(t.nbytes for network in networks.values() for t in network.state_dict().values())


@pytest.mark.parametrize("share", [1.5, 0.8, 0.5])
def test_the_same_picture_in_less_memory(sockets, plain, on, share):
    device = Late(int(share * weights(sockets)) + WORKING)
    on(device)
    for _ in range(2):
        assert (text_to_image(sockets)["image"] - plain).abs().max() <= 1e-5
    assert device.peak <= device.size


def test_with_room_for_all_nothing_moves_after_the_first_picture(sockets, plain, on):
    device = Counting(2 * weights(sockets) + 20 * WORKING)
    on(device)
    text_to_image(sockets)
    copied = device.copied
    assert (text_to_image(sockets)["image"] - plain).abs().max() <= 1e-5
    assert device.copied == copied > 0


def test_a_run_that_is_out_of_memory_goes_on_in_a_smaller_placement(sockets, plain, on):
    on(Counting(2 * weights(sockets) + 20 * WORKING))
    forwards = count()

    def fail(module, given):
        if next(forwards) in (2, 3):  # the third, and the first of the next try
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    told = Told()
    hook = sockets["stage_c"].network.clf.register_forward_pre_hook(fail)
    try:
        with reporting.reporting_to(told):
            image = text_to_image(sockets)["image"]
    finally:
        hook.remove()
    assert told.said == [
        "out of memory; trying again with the other stages off the device.",
        "out of memory; trying again with half of the weights streamed from main memory.",
    ]
    assert (image - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("share", [1.5, 0.5])
def test_a_run_that_is_stopped_leaves_all_as_it_was(sockets, plain, on, share):
    on(Late(int(share * weights(sockets)) + WORKING))
    for after in (2, 5):
        with pytest.raises(Interrupted), reporting.reporting_to(Told(stop_after=after)):
            text_to_image(sockets)
        assert (text_to_image(sockets)["image"] - plain).abs().max() <= 1e-5


def test_stage_a_takes_tiles_where_the_whole_is_too_large(sockets, on, monkeypatch):
    vae = sockets["stage_a"]
    latent, image = torch.randn(1, 4, 80, 60), torch.rand(1, 160, 320, 3)
    whole = decode_latent(vae, latent, 0), encode_pixels(vae, image)
    monkeypatch.setattr(tiled, "LEAST", 0)
    pool = on(Counting(1_400_000))
    seen = []
    real = tiled.join_tiles
    monkeypatch.setattr(
        tiled, "join_tiles", lambda f, x, tile, *more: seen.append(tile) or real(f, x, tile, *more)
    )
    assert (decode_latent(vae, latent, 0) - whole[0]).abs().max() <= 1e-5
    assert (encode_pixels(vae, image) - whole[1]).abs().max() <= 1e-5
    assert all(0 < tile < 60 for tile in seen)
    assert pool.free_bytes(vae.decoder) < 1_400_000


def test_stage_a_takes_smaller_tiles_when_out_of_memory(sockets, on, monkeypatch):
    vae, latent = sockets["stage_a"], torch.randn(1, 4, 80, 60)
    whole = decode_latent(vae, latent, 0)
    on(Counting(10**9))
    largest = []

    def fail(module, given):
        largest.append(given[0].shape[-2])
        if given[0].shape[-2] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    told = Told()
    hook = vae.decoder.up_blocks.register_forward_pre_hook(fail)
    try:
        with reporting.reporting_to(told):
            decoded = decode_latent(vae, latent, 0)
            with pytest.raises(torch.OutOfMemoryError):  # a size that was asked for is kept
                decode_latent(vae, latent, 320)
    finally:
        hook.remove()
    assert largest[0] == 80
    assert all("out of memory; trying again in tiles of" in text for text in told.said)
    assert (decoded - whole).abs().max() <= 1e-5
