"""Programs of this project: the readable networks, the engine, and the engine with 8-bit products."""

from copy import deepcopy
from functools import cache
from typing import Any

from cascade_nodes.cascade_core.engine import Engine
from cascade_nodes.cascade_core.engine.vqgan import DecoderEngine
from cascade_nodes.cascade_core.networks.quantisation import E4M3, quantise_network
from ceilings import has_fp8
from networks import CLASSES, Setup, random_network
from picture import Program

EAGER, ENGINE, FP8 = "eager", "engine", "engine, fp8"


class Ours:
    """Owner of the weights, which all other programs share."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.network, self.program = cache(self._network), cache(self._program)
        self._engines: list[Any] = []

    def names(self) -> list[str]:
        """Names of the programs; fp8 only where the device supports it."""
        return [EAGER, ENGINE, *([FP8] if has_fp8(self.setup.device) else [])]

    def forget(self) -> None:
        """Drops the engine's caches and graphs, so that their memory is counted anew."""
        for engine in self._engines:
            engine.forget()

    def _network(self, kind: str) -> Any:
        return random_network(kind, self.setup)

    def _program(self, name: str) -> Program:
        c, b, a = (self.network(kind) for kind in CLASSES)
        if name == EAGER:
            return Program(name, c, b, a.decode)
        if name == FP8:
            c, b = (quantise_network(deepcopy(network), E4M3) for network in (c, b))
        engine_c, engine_b = (Engine(network, join=True) for network in (c, b))
        self._engines += [engine_c, engine_b]
        return Program(name, engine_c, engine_b, DecoderEngine(a))
