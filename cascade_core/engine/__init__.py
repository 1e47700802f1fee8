"""The engine: computes what a network computes, from its own weights, with less work. Equal within rounding.

engine.py      `Engine`, called like the network; caches everything constant across sampling steps
shapes.py      what is cached for one shape of inputs; lru.py: the cache
weights.py     whether the weights changed or moved since
unet.py        Stage B and C as a flat program over tokens
blocks.py      the bound blocks of the program; state.py: what they read and change
vqgan.py       Stage A's decoder
operations.py  the operations of the program, in plain PyTorch; cuda.py: fused kernels; fp8.py: products in e4m3;
               cublas.py: kernels beside cuBLAS, for cards before Ampere
backend.py     which operations run on a device; fallback.py: what goes on where a kernel fails
graphs.py      CUDA graphs; workspace.py: the memory of what they compute; layout.py: copies between tokens and images
card.py        what kernels are chosen and compiled for; usual_forwards.py: what a card will be asked for
compilation.py a process that compiles a network's kernels before they are needed; compilation_process.py: its work
kernels/       the fused kernels, in Triton
"""

from .backend import Precision, operations_on
from .engine import Engine

__all__ = ["Engine", "Precision", "operations_on"]
