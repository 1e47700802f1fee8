"""Measurements of benchmarks/gpu.py: `measure(context)` returns the results that are stored, `report` prints them."""
