"""Triton kernels of the engine, for CUDA (or, in the tests, for Triton's interpreter).

rows.py        whole rows as tiles, and their LayerNorm
depthwise.py   3×3 depthwise convolution with what follows it
response.py    GELU and global response norm; resident.py, in one launch where it fits
modulation.py  scale and shift by the noise condition, with LayerNorm
attention.py   flash attention to the tokens and the conditioning
vqgan.py       what Stage A has besides
matmul.py      a matrix product with prologues and epilogues; products.py, those that the networks have
fp8.py         quantised operands of products
tuned.py       which way a product is fastest, as measured
launch.py      launches, and compiling ahead of the first

Feature maps are tokens: contiguous (B, N, C), N = height · width, in bfloat16, float16 or float32. Arithmetic is in
float32, results are rounded once, to the tensor's dtype. Kernels run on the current device and stream; callers see to
it that it is that of the tensors. This package imports nothing: its modules need Triton, which CUDA builds of PyTorch
bring along, 3.3 or newer.
"""
