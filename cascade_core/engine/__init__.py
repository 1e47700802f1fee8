"""The engine: gives a network's outputs, equal within rounding, from the network's own weights with less work.

engine.py      `Engine`, called like the network; caches everything constant across sampling steps
shapes.py      cached values for one shape of inputs; lru.py: the cache
weights.py     checks whether the weights changed or moved
unet.py        Stage B and C as a flat program over tokens
blocks.py      the bound blocks of the program; state.py: the data that they read and change
vqgan.py       Stage A's decoder
operations.py  the operations of the program, in plain PyTorch; cuda.py: fused kernels; fp8.py: products in e4m3;
               cublas.py: kernels beside cuBLAS, for cards before Ampere
backend.py     chooses the operations for a device; fallback.py: slower ways where a kernel fails
graphs.py      CUDA graphs; workspace.py: memory of their intermediate values; layout.py: copies between tokens and
               images
card.py        the card that kernels are compiled for; usual_forwards.py: the forwards that it will probably run
compilation.py a process that compiles a network's kernels before they are needed; compilation_process.py: its work
kernels/       the fused kernels, in Triton
"""

from .backend import Precision, operations_on
from .engine import Engine

__all__ = ["Engine", "Precision", "operations_on"]
