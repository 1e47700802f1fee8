"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): activations are recomputed in the backward pass.

Each block stores only its input, a tenth of the memory of its activations, at the cost of a third more time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..networks.layers import AttnBlock, FeedForwardBlock, ResBlock, TimestepBlock

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]
LARGE_NETWORK = 300_000_000  # parameters from which Stage C's blocks are checkpointed by default
CHECKPOINTED = (AttnBlock, FeedForwardBlock, ResBlock)


def checkpoint_blocks(
    network: nn.Module,
    contexts: Contexts = lambda: (nullcontext(), nullcontext()),
    reentrant: bool = False,
) -> None:
    """Checkpoint the network's blocks, in place.

    contexts: called in each block's forward pass; returns the context of that and the one of its recomputation, which
        sees to it that what the block draws is the same. A network in training draws its dropout again.
    reentrant: by a backward pass within the backward pass, without `contexts`, which spares the processor a third of
        its work: it keeps no tensor in Python. The results are the same, to the bit.
    """
    for block in blocks_of(network, CHECKPOINTED):
        block.forward = _checkpointed(block, block.forward, contexts, reentrant)


def blocks_of(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    return [block for block in network.modules() if isinstance(block, kinds)]


def _checkpointed(
    block: nn.Module, forward: Callable[..., Any], contexts: Contexts, reentrant: bool
) -> Callable[..., Any]:
    @wraps(forward)
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        rng = block.training  # for dropout; costs a synchronisation with the accelerator
        if reentrant and any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
            return checkpoint(forward, *inputs, use_reentrant=True, preserve_rng_state=rng)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=rng,
            context_fn=contexts,
        )

    return run


def compile_blocks(network: nn.Module) -> None:
    """Compiles each kind of block once, at its first use: compiling a whole network takes minutes."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, times widths and sizes
    for block in blocks_of(network, (*CHECKPOINTED, TimestepBlock)):
        block.forward = torch.compile(block.forward)
