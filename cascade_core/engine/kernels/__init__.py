"""Triton kernels of the engine, for CUDA (or, in the tests, for Triton's interpreter).

rows.py        tiles of whole rows, and their LayerNorm
depthwise.py   3×3 depthwise convolution fused with the norm after it
response.py    GELU and global response norm; resident.py: in one launch where h fits the registers
modulation.py  scale and shift by the noise condition, LayerNorm
attention.py   flash attention to the tokens and the conditioning
vqgan.py       Stage A's element-wise kernels
matmul.py      a matrix product with epilogues; products.py: those that the networks use
fp8.py         quantised operands of products
tuned.py       tile configurations, and the table of the fastest
launch.py      launches, and compiling ahead of the first one; described.py: compiling for a card that is not there

Feature maps are tokens: contiguous (B, N, C), N = height · width, in bfloat16, float16 or float32. Arithmetic is in
float32, results are rounded once, to the tensor's dtype. Kernels run on the current device and stream, which must be
the tensors' own. This package imports nothing: its modules need Triton 3.3 or newer, which CUDA builds of PyTorch
bring along.
"""
