"""This project: the readable networks as they are, the engine, and the engine with 8-bit products."""

import inspect
from functools import cache
from typing import Any

from cascade_nodes.cascade_core import engine
from ceilings import has_fp8
from loop import Program
from networks import CLASSES, Setup, random_network

EAGER, ENGINE, FP8 = "eager", "engine", "engine, fp8"


class Ours:
    """One set of weights; all other programs share it."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.network = cache(self._network)

    def _network(self, kind: str) -> Any:
        return random_network(kind, self.setup)

    @property
    def has_fp8(self) -> bool:
        """Whether this engine offers it and this device can do it."""
        return has_fp8(self.setup.device) and "precision" in inspect.signature(engine.accelerated).parameters

    def names(self) -> list[str]:
        return [EAGER, ENGINE, *([FP8] if self.has_fp8 else [])]

    def program(self, name: str) -> Program:
        c, b, a = (self.network(kind) for kind in CLASSES)
        if name == EAGER:
            return Program(name, c, b, a.decode)
        precision: dict[str, Any] = {"precision": "fp8"} if name == FP8 else {}
        fast_c, fast_b = (engine.accelerated(network, **precision) for network in (c, b))
        return Program(name, fast_c, fast_b, engine.accelerated_decode(a))

    def forget(self) -> None:
        """The engine's prepared values and graphs, so that their memory is counted anew."""
        for name in self.names():
            program = self.program(name)
            for fast in (program.stage_c, program.stage_b, program.decode):
                getattr(fast, "forget", bool)()
