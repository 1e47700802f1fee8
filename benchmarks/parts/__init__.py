"""The parts of benchmarks/gpu.py: each has `measure(bench)`, whose answer is kept, and `report(found)`, to print it."""
