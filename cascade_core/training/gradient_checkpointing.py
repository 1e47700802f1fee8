"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): activations are recomputed in the backward pass.

Each block stores only its input, a tenth of the memory of its activations, at the cost of a third more time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from itertools import islice
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
) -> None:
    """Checkpoint the network's blocks, in place.

    contexts: called in each block's forward pass; returns the context of that and the one of its recomputation, which
        sees to it that what the block draws is the same. A network in training draws its dropout again.
    """
    for block in blocks_of(network, CHECKPOINTED):
        block.forward = _checkpointed(block, block.forward, contexts)


def checkpoint_segments(network: Any) -> None:
    """Checkpoint the segments of a network that is divided, in place. They store a third of what its blocks would.

    By a backward pass within the backward pass, which spares the processor a third of its work: it keeps no tensor in
    Python. The results are those of `checkpoint_blocks`, to the bit.
    """
    for level, _ in network.levels():
        for segment in segments_of(level):
            _checkpoint_together(segment)


def segments_of(level: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Segments of a level: its blocks from one ResBlock to the next, all with trained parameters or none of them."""
    segment, trained = list[Any](), False
    for block in level:
        own = any(parameter.requires_grad for parameter in block.parameters())
        if segment and (isinstance(block, ResBlock) or own != trained):
            yield segment
            segment = []
        segment.append(block)
        trained = own
    if segment:
        yield segment


def blocks_of(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    return [block for block in network.modules() if isinstance(block, kinds)]


def _checkpointed(block: nn.Module, forward: Callable[..., Any], contexts: Contexts) -> Callable[..., Any]:
    @wraps(forward)
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=block.training,  # for dropout; costs a synchronisation with the accelerator
            context_fn=contexts,
        )

    return run


def _checkpoint_together(segment: list[Any]) -> None:
    """Makes the last block of a segment run all of it, as one checkpoint; the others return their input as it is.

    So each block is still called where it was, with the hooks that gather its weights.
    """
    forwards = [block.forward for block in segment]
    called: list[tuple[Any, ...]] = []  # what each block was called with, beside x

    def run(index: int, x: Tensor, *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forwards[index](x, *inputs)
        called[index:] = [inputs]
        if index + 1 < len(segment):
            return x
        given = [each for inputs in called for each in inputs]
        together = partial(_run_all, list(zip(forwards, map(len, called), strict=True)))
        called.clear()  # else the inputs would live until the next forward pass
        return checkpoint(
            together,
            x,
            *given,
            use_reentrant=any(isinstance(each, Tensor) and each.requires_grad for each in (x, *given)),
            preserve_rng_state=segment[0].training,
        )

    for index, block in enumerate(segment):
        block.forward = partial(run, index)


def _run_all(blocks: list[tuple[Callable[..., Tensor], int]], x: Tensor, *inputs: Any) -> Tensor:
    """Runs blocks one after the other. blocks: their functions, and how many of the inputs each one takes"""
    remaining = iter(inputs)
    for forward, count in blocks:
        x = forward(x, *islice(remaining, count))
    return x


def compile_blocks(network: nn.Module) -> None:
    """Compiles each kind of block once, at its first use: compiling a whole network takes minutes."""
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, times widths and sizes
    for block in blocks_of(network, (*CHECKPOINTED, TimestepBlock)):
        block.forward = torch.compile(block.forward)
