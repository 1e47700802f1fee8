"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks are computed again in the backward pass.

Of each block only its input is kept, a tenth of what its backward pass needs, for a third more time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..networks.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock

LARGE = 300_000_000  # parameters from which Stage C's blocks are computed again rather than kept
BLOCKS = (AttnBlock, FeedForwardBlock, ResBlock)


def recompute_blocks(network: nn.Module, around: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """From now on the network's blocks keep no more than their input for the backward pass.

    around: called with each block, gives the context in which the block shall be computed again.
    """
    for block in blocks(network, BLOCKS):
        block.forward = _recomputed(block, block.forward, around)


def blocks(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    return [block for block in network.modules() if isinstance(block, kinds)]


def _recomputed(block: nn.Module, forward: Callable[..., Any], around: Callable[[], AbstractContextManager]):
    @wraps(forward)
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=block.training,  # for dropout; costs a wait for the accelerator
            context_fn=lambda: (nullcontext(), around()),
        )

    return run


def compile_blocks(network: nn.Module) -> None:
    """Each kind of block is compiled once, at its first use: a whole network takes minutes."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, times widths and sizes
    for block in blocks(network, (*BLOCKS, TimestepBlock)):
        block.forward = torch.compile(block.forward)
