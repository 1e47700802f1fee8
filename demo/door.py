"""The front door with the demo behind it: `StableCascade.demo()` makes pictures with no download."""

from pathlib import Path
from typing import Any, Self

import torch

from cascade_nodes.cascade_core import pipeline
from cascade_nodes.cascade_core.arguments import StageSettings

WEIGHTS = Path(__file__).parent / "weights"
# Settings of the example graphs: gentler guidance in Stage C than the published 4 at shift 2, a little more in Stage B.
PRIOR = StageSettings(steps=20, cfg=3.0, cfg_rescale=0.0, sampler="dpmpp_2m")
DECODER = StageSettings(steps=10, cfg=1.4, cfg_rescale=0.0)
SIZE = (256, 256)


class StableCascade(pipeline.StableCascade):
    """The core's StableCascade, which also knows where the bundled demo lies."""

    @classmethod
    def demo(
        cls, *, dtype: str = "auto", device: str | torch.device = "auto", memory: int | str | None = None
    ) -> Self:
        """The bundled cascade of a toy world, at 256 × 256, with the settings of its example graphs."""
        options: dict[str, Any] = {"dtype": dtype, "device": device, "memory": memory}
        return cls.load(WEIGHTS, prior=PRIOR, decoder=DECODER, size=SIZE, **options)
