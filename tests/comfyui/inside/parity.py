"""Our networks against ComfyUI's own with the same random weights, float32: the largest relative difference."""

from typing import Any

import comfy.ldm.cascade.controlnet
import comfy.ldm.cascade.stage_a
import comfy.ldm.cascade.stage_b
import comfy.ldm.cascade.stage_c
import comfy.ldm.cascade.stage_c_coder
import comfy.ops
import torch
from comparing import randomise, relative

from cascade_nodes.cascade_core import (
    ControlNet,
    Previewer,
    SemanticCompressor,
    StageA,
    StageB,
    StageC,
    load_published_state_dict,
)

OPERATIONS = comfy.ops.manual_cast
STAGE_C = {
    "c_in": 16, "c_out": 16, "c_r": 64, "patch_size": 1, "c_cond": 128, "c_hidden": [128, 128], "nhead": [2, 2],
    "blocks": [[1, 2], [2, 1]], "block_repeat": [[1, 1], [1, 1]], "level_config": ["CTA", "CTA"],
    "c_clip_text": 64, "c_clip_text_pooled": 64, "c_clip_img": 32, "c_clip_seq": 4, "kernel_size": 3,
    "dropout": [0.0, 0.0], "self_attn": True, "t_conds": ["sca", "crp"], "switch_level": [False],
}  # fmt: skip
STAGE_B = {
    "c_in": 4, "c_out": 4, "c_r": 64, "patch_size": 2, "c_cond": 64, "c_hidden": [64, 128], "nhead": [-1, 2],
    "blocks": [[1, 2], [2, 1]], "block_repeat": [[1, 2], [2, 1]], "level_config": ["CT", "CTA"], "c_clip": 64,
    "c_clip_seq": 4, "c_effnet": 16, "c_pixels": 3, "kernel_size": 3, "dropout": [0.0, 0.0], "self_attn": True,
    "t_conds": ["sca"],
}  # fmt: skip
STAGE_A = {"levels": 2, "bottleneck_blocks": 3, "c_hidden": 64, "c_latent": 4, "codebook_size": 32}


def twins(ours, theirs, **arguments) -> tuple[Any, Any]:
    """Both networks with the same weights, ours loaded from theirs by the published names."""
    native = theirs(**arguments).eval()
    network = load_published_state_dict(ours.from_config(arguments), randomise(native)).eval()
    return network, native


def native(kind, **arguments):
    return kind(**arguments, operations=OPERATIONS)


def stage_c(control: bool) -> float:
    ours, theirs = twins(StageC, lambda **a: native(comfy.ldm.cascade.stage_c.StageC, **a), **STAGE_C)
    x, r = torch.randn(2, 16, 12, 9), torch.rand(2)
    text, pooled, image = torch.randn(2, 77, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 32)
    residuals = [torch.randn(2, 128, 6, 5) if block % 2 else None for block in range(6)]
    ours_control = residuals if control else None
    their_control = {"input": residuals[::-1]} if control else None
    return relative(
        ours(x, r, text, pooled, image, control=ours_control),
        theirs(x, r, text, pooled, image, control=their_control),
    )


def stage_b() -> float:
    ours, theirs = twins(StageB, lambda **a: native(comfy.ldm.cascade.stage_b.StageB, **a), **STAGE_B)
    inputs = torch.randn(2, 4, 24, 32), torch.rand(2), torch.randn(2, 16, 3, 4), torch.randn(2, 1, 64)
    return relative(ours(*inputs), theirs(*inputs))


def stage_a() -> dict[str, float]:
    ours, theirs = twins(StageA, lambda **a: comfy.ldm.cascade.stage_a.StageA(**a), **STAGE_A)
    latent, image = torch.randn(1, 4, 12, 16), torch.rand(1, 3, 48, 64)
    factor = ours.config.scale_factor  # ComfyUI's latents are in the codebook's units
    return {
        "decode": relative(ours.decode(latent / factor), theirs.decode(latent)),
        "encode": relative(ours.encode(image) * factor, theirs.encode(image)),
    }


def coder() -> dict[str, float]:
    theirs = comfy.ldm.cascade.stage_c_coder.StageC_coder().eval()
    encoder = {f"{part}.{name}": tensor for part in ("backbone", "mapper")
               for name, tensor in randomise(getattr(theirs.encoder, part)).items()}  # fmt: skip
    compressor = load_published_state_dict(SemanticCompressor.from_config({}), encoder).eval()
    previewer = load_published_state_dict(Previewer.from_config({}), randomise(theirs.previewer)).eval()
    image, latent = torch.rand(1, 3, 96, 64), torch.randn(1, 16, 3, 2)
    return {
        "compressor": relative(compressor(image), theirs.encode(image)),
        "previewer": relative(previewer(latent), theirs.decode(latent) / 2 + 0.5),  # theirs is in [-1, 1]
    }


def controlnet(c_in: int) -> float:
    arguments = {"c_in": c_in, "c_proj": 64, "proj_blocks": [0, 2, 5]}
    theirs = comfy.ldm.cascade.controlnet.ControlNet(**arguments, operations=OPERATIONS).eval()
    ours = load_published_state_dict(ControlNet.from_config(arguments), randomise(theirs)).eval()
    hint = torch.rand(1, c_in, 96, 64)
    mine, reference = ours(hint), list(reversed(theirs(hint)["input"]))
    assert [one is None for one in mine] == [one is None for one in reference]
    pairs = zip(mine, reference, strict=True)
    return max(relative(a, b) for a, b in pairs if a is not None and b is not None)


def measure() -> dict[str, float]:
    return {
        "stage_c": stage_c(control=False),
        "stage_c_with_control": stage_c(control=True),
        "stage_b": stage_b(),
        **{f"stage_a_{way}": value for way, value in stage_a().items()},
        **coder(),
        **{f"controlnet_of_{c_in}_channels": controlnet(c_in) for c_in in (1, 3, 4)},
    }
