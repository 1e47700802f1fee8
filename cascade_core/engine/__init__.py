"""The fast path: a network's own weights, walked with less work. Equal to the readable one within rounding.

engine.py      called like the network; caches everything constant across sampling steps
lru.py         the caches themselves
unet.py        Stage B and C as a flat program over tokens
blocks.py      each block with what can be computed when it is bound
operations.py  what the program computes with, in plain PyTorch; cuda.py, in fused kernels; fp8.py, its products in e4m3
graphs.py      CUDA graphs
kernels/       the same operations fused, in Triton
"""

from .engine import Engine, Precision, operations_on

__all__ = ["Engine", "Precision", "operations_on"]
