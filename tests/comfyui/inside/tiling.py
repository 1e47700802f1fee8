"""Tiles in ComfyUI: decoding, encoding and Stage B, ours and its own, against the whole and the other host."""

from typing import Any

import comfy.model_management
import interop
import native
import torch
from comparing import relative
from interop import only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui, headless
from cascade_nodes.nodes.hosts.comfyui.tiling import in_tiles
from cascade_nodes.nodes.hosts.run import SamplingRequest
from cascade_nodes.nodes.latents import CascadeDecode

SIDES = 50, 66  # latent positions: 200 × 264 pixels
ODD = 51, 75  # of a picture of 204 × 300 pixels
TILE = 32
STAGE_A, STAGE_B = WEIGHTS / "demo_stage_a.safetensors", WEIGHTS / "demo_stage_b.safetensors"
NETWORKS = {"stage_b": STAGE_B, "stage_c": WEIGHTS / "demo_stage_c.safetensors"}


def stage_a() -> dict[str, float]:
    """Every way with tiles against every other, and the largest piece that a network saw."""
    latent, image = torch.randn(1, 4, *SIDES), torch.rand(1, SIDES[0] * 4, SIDES[1] * 4, 3)
    figures = {}
    pictures: list[Tensor] = []
    for name, host, vae in (
        ("ours", comfyui, comfyui.load_stage_a(STAGE_A)),
        ("native", comfyui, native.vae()),
        ("headless", headless, headless.load_stage_a(STAGE_A)),
    ):
        whole, tiled = (host.decode_latent(vae, latent, 4 * tile) for tile in (0, TILE))
        figures[f"{name}, decoded in tiles and whole"] = (whole - tiled).abs().max().item()
        pictures.append(tiled)
        whole, tiled = (host.encode_pixels(vae, image, 4 * tile) for tile in (0, TILE))
        figures[f"{name}, encoded in tiles and whole"] = relative(tiled, whole)
    figures["decoded in tiles, ours and headless"] = (pictures[0] - pictures[2]).abs().max().item()
    figures["decoded in tiles, native and headless"] = (pictures[1] - pictures[2]).abs().max().item()
    return figures


def previewer() -> dict[str, float]:
    vae = comfyui.load_compressor(
        WEIGHTS / "demo_compressor.safetensors", WEIGHTS / "demo_previewer.safetensors"
    )
    latent = {"samples": torch.randn(1, 16, 23, 17)}
    whole, tiled = (only(CascadeDecode.execute(vae, latent, tile)) for tile in (0, 64))
    return {"previewed in tiles and whole": (whole - tiled).abs().max().item()}


def make_run(model: Any, **changed: Any) -> SamplingRequest:
    """A run of Stage B, with two prompts and a Stage C latent of numbers alone."""
    generator = torch.Generator().manual_seed(2)

    def prompt(strength: float) -> list:
        pooled = torch.randn(1, 192, generator=generator)
        prior = torch.randn(1, 16, 5, 7, generator=generator) * strength
        return [[torch.zeros(1, 77, 192), {"pooled_output": pooled, "stable_cascade_prior": prior}]]

    settings: dict[str, Any] = {
        "latent": torch.zeros(1, 4, *SIDES), "seed": 3, "steps": 3, "cfg": 1.5, "cfg_rescale": 0.5,
        "tile_positions": TILE, **changed,
    }  # fmt: skip
    return interop.make_run("stage_b", model, (prompt(1.0), prompt(0.0)), **{"sampler": "ddpm", **settings})


def stage_b() -> dict[str, Any]:
    ours, theirs = comfyui.load_network("stage_b", STAGE_B, "fp32"), native.model("stage_b", STAGE_B)
    headless_model = headless.load_network("stage_b", STAGE_B, "fp32")
    tiled = comfyui.sample(make_run(ours)).latent
    expected = headless.sample(make_run(headless_model)).latent
    whole = comfyui.sample(make_run(ours, tile_positions=0)).latent
    one_tile = comfyui.sample(make_run(ours, tile_positions=80)).latent
    return {
        "sampled in tiles, ours and headless": relative(tiled, expected),
        "sampled in tiles, native and headless": relative(comfyui.sample(make_run(theirs)).latent, expected),
        "sampled whole and in one tile": relative(one_tile, whole),
        "sampled after tiles": relative(comfyui.sample(make_run(ours, tile_positions=0)).latent, whole),
    }


def odd() -> dict[str, float]:
    """Stage B on a latent that ends within its patches, as VAEEncode of 300 × 200 pixels makes one."""
    latent = torch.randn(1, 4, *ODD)
    models = {
        "ours": (comfyui, comfyui.load_network("stage_b", STAGE_B, "fp32")),
        "native": (comfyui, native.model("stage_b", STAGE_B)),
        "headless": (headless, headless.load_network("stage_b", STAGE_B, "fp32")),
    }
    figures = {}
    for tile in (0, TILE):
        made = {
            name: host.sample(make_run(model, latent=latent, denoise=0.4, tile_positions=tile)).latent
            for name, (host, model) in models.items()
        }
        assert all(one.shape == latent.shape for one in made.values())
        for name in ("ours", "native"):
            difference = relative(made[name], made["headless"])
            figures[f"odd in tiles of {tile}, {name} and headless"] = difference
    prompts = (make_run(None).positive, make_run(None).negative)
    ours, theirs = (
        only(nodes.KSampler().sample(
            model, 3, 3, 1.5, "ddim", "simple", *prompts, {"samples": latent}, denoise=0.4
        ))["samples"]
        for model in (models["ours"][1], in_tiles(models["native"][1], 0, ODD))
    )  # fmt: skip
    return {**figures, "odd by KSampler, ours and native": relative(ours, theirs)}


def without_previewer() -> list[str]:
    """What each way of decoding says where there is no previewer."""
    vae = comfyui.load_compressor(WEIGHTS / "demo_compressor.safetensors", None)
    latent = {"samples": torch.randn(1, 16, 23, 17)}
    sentences = []
    for decode in (
        lambda: CascadeDecode.execute(vae, latent, 0),
        lambda: CascadeDecode.execute(vae, latent, 64),
        lambda: nodes.VAEDecode().decode(vae, latent),
        lambda: nodes.VAEDecodeTiled().decode(vae, latent, 512),
    ):
        try:
            decode()
        except CascadeError as error:
            sentences.append(str(error))
    return sentences


def seen() -> dict[str, Any]:
    """What the host plans for and runs: the memory of tiles, and a wrapper of another node around them."""
    model = comfyui.load_network("stage_b", STAGE_B, "fp32")
    planned, run, wrapped = [], [], []
    estimate = model.model.memory_required
    model.model.memory_required = lambda shape, **more: (
        planned.append(list(shape)),
        estimate(shape, **more),
    )[1]
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda module, inputs: run.append(list(inputs[0].shape))
    )

    def wrapper(apply_model, values):
        wrapped.append(list(values["input"].shape))
        return apply_model(values["input"], values["timestep"], **values["c"])

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    comfyui.sample(make_run(patched, steps=1))
    hook.remove()
    return {"planned": planned[:2], "run": run, "wrapped": wrapped}


def interrupted() -> int:
    """How many tiles were run after Interrupt was pressed in the second."""
    model = comfyui.load_network("stage_b", STAGE_B, "fp32")
    tiles = 0

    def press(module, inputs):
        nonlocal tiles
        tiles += 1
        if tiles == 2:
            comfy.model_management.interrupt_current_processing(True)

    hook = model.model.diffusion_model.register_forward_pre_hook(press)
    try:
        comfyui.sample(make_run(model))
    except comfy.model_management.InterruptProcessingException:
        return tiles - 2
    finally:
        hook.remove()
    raise AssertionError("the run was not interrupted")


def graph_memory() -> dict[str, int]:
    """By how many bytes the estimate of Stage B's forward falls with CUDA graphs that hold so many."""
    management = comfy.model_management
    model = comfyui.load_network("stage_b", NETWORKS["stage_b"], "fp32")
    memory, device = model.model.diffusion_model.engine._graph_memory, management.get_torch_device()

    def estimate(held: int) -> int:
        memory.memory = torch.empty(held, dtype=torch.uint8, device=device)
        return model.model.memory_required([2, 4, *SIDES])

    bare = estimate(0)
    return {"half": bare - estimate(bare // 2) - bare // 2, "more than a forward": estimate(bare + 1)}


def measure() -> dict[str, Any]:
    differences = {**stage_a(), **previewer(), **stage_b()}
    return {
        "differences": differences,
        "seen": seen(),
        "tiles after Interrupt": interrupted(),
        "graph memory": graph_memory(),
        "odd": odd(),
        "without previewer": without_previewer(),
    }
