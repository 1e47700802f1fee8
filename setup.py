"""The packages, found. Everything else about the project stands in pyproject.toml.

The root folder itself is the package `cascade_nodes`, which the finder in pyproject.toml has no words for.
"""

from setuptools import find_packages, setup

ROOMS = ["cascade_core", "demo", "headless", "nodes"]

rooms = find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)])
setup(
    script_name=__file__,  # so that this file is not taken for a module of the root package
    packages=["cascade_nodes", *(f"cascade_nodes.{room}" for room in rooms)],
)
