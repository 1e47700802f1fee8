"""Forwards of usual shapes on the meta device, without weights or a card, run only to compile their kernels.

Nearly all kernels of a network are the same at every size. The size decides only whether a feature map fits the
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
from ..networks.quantisation import FORMATS, quantise_network
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from .backend import Precision
from .engine import Engine
from .vqgan import DecoderEngine

SIZE = (1024, 1024)  # of a picture
BATCH = 2  # one picture with guidance
BLOCKS = 2  # of a level; more would launch the same kernels
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
    """A forward of a network of this configuration on the meta device, to be called where a card is `described`.

    size: of the picture, (height, width); batch: rows that Stage C or B computes at once
    """
    engine = usual_engine(config, dtype, precision)
    return lambda: call_as_usual(engine, dtype, size, batch)


def usual_engine(
    config: Any, dtype: torch.dtype, precision: Precision = "exact", device: torch.device | None = None
) -> Any:
    """The engine of a network of this configuration, only deep enough to launch every kernel. device: None: meta"""
    if hasattr(config, "blocks"):
        blocks = tuple(tuple(min(count, BLOCKS) for count in half) for half in config.blocks)
        config = replace(config, blocks=blocks)
    with device or torch.device("meta"):
        network: Any = NETWORKS[type(config)](config)
    network = network.to(dtype).eval().requires_grad_(False)
    if isinstance(network, StageA):
        return DecoderEngine(network, notify=_fail)
    if isinstance(network, StageC) and dtype == torch.float16:
        scale_residual_stream(network)
    if precision != "exact":
        quantise_network(network, FORMATS[precision])
    return Engine(network, notify=_fail)


def call_as_usual(
    engine: Any, dtype: torch.dtype, size: tuple[int, int] = SIZE, batch: int = BATCH
) -> object:
    """Calls an engine of `usual_engine` with inputs of the usual shapes; their values do not matter."""
    network: Any = engine.stage_a if isinstance(engine, DecoderEngine) else engine.network
    device = next(network.parameters()).device
    semantic, latent = stage_c_size(*size), stage_b_size(*size)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if isinstance(engine, DecoderEngine):
        return engine(empty(1, network.config.c_latent, *latent))
    config, noise_cond = network.config, torch.ones(batch)
    if isinstance(network, StageB):
        return engine(
            empty(batch, config.c_in, *latent),
            noise_cond,
            clip=empty(batch, 1, config.c_clip),
            effnet=empty(batch, config.c_effnet, *semantic),
        )
    return engine(
        empty(batch, config.c_in, *semantic),
        noise_cond,
        clip_text=empty(batch, TEXT_TOKENS, config.c_clip_text),
        clip_text_pooled=empty(batch, 1, config.c_clip_text_pooled),
        clip_img=empty(batch, 1, config.c_clip_img),
    )


def _fail(message: str) -> None:
    """Raises the engine's notice of a fallback as an error: plain PyTorch would launch no kernels."""
    raise RuntimeError(message)
