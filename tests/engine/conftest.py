"""Kernels of the engine are interpreted in these tests, wherever they run."""

from cascade_nodes.tests.engine import interpreted  # noqa: F401
