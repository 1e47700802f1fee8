"""Forwards of usual shapes on the meta device, without weights or a card: for the sake of the kernels they launch.

Nearly all kernels of a network are the same at every size. What a size decides: whether a feature map fits the
registers of the card, how many keys full blocks leave over, and the nearest entry of the table of products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import stage_b_size, stage_c_size
from ..networks.config import NetworkConfig, StageAConfig, StageBConfig, StageCConfig
from ..networks.fp16 import scale_residual_stream
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from .backend import Precision
from .engine import Engine
from .vqgan import DecoderEngine

SIZE = (1024, 1024)  # of a picture
BATCH = 2  # one picture with guidance
BLOCKS = 2  # of a level: more launch the same kernels again
TEXT_TOKENS = 77  # of a prompt of usual length
NETWORKS: dict[type[NetworkConfig], type[nn.Module]] = {
    StageAConfig: StageA,
    StageBConfig: StageB,
    StageCConfig: StageC,
}


def usual_forward(
    config: Any,
    dtype: torch.dtype,
    precision: Precision = "exact",
    size: tuple[int, int] = SIZE,
    batch: int = BATCH,
) -> Callable[[], object]:
    """A forward of a network of this configuration, to be called where a card is `described`.

    size: of the picture, (height, width); batch: of what Stage C or B computes at once
    """
    if hasattr(config, "blocks"):
        config = replace(
            config, blocks=tuple(tuple(min(count, BLOCKS) for count in half) for half in config.blocks)
        )
    with torch.device("meta"):
        network: Any = NETWORKS[type(config)](config)
    network = network.to(dtype).eval().requires_grad_(False)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if isinstance(network, StageA):
        decoder = DecoderEngine(network, notify=_fail)
        return lambda: decoder(empty(1, config.c_latent, *stage_b_size(*size)))
    if isinstance(network, StageC) and dtype == torch.float16:
        scale_residual_stream(network)
    engine, noise_cond, semantic = (
        Engine(network, precision=precision, notify=_fail),
        torch.ones(batch),
        stage_c_size(*size),
    )
    if isinstance(network, StageB):
        return lambda: engine(
            empty(batch, config.c_in, *stage_b_size(*size)),
            noise_cond,
            clip=empty(batch, 1, config.c_clip),
            effnet=empty(batch, config.c_effnet, *semantic),
        )
    return lambda: engine(
        empty(batch, config.c_in, *semantic),
        noise_cond,
        clip_text=empty(batch, TEXT_TOKENS, config.c_clip_text),
        clip_text_pooled=empty(batch, 1, config.c_clip_text_pooled),
        clip_img=empty(batch, 1, config.c_clip_img),
    )


def _fail(message: str) -> None:
    """The engine's way out, plain PyTorch, launches nothing."""
    raise RuntimeError(message)
