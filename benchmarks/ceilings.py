"""Measured ceilings of the device and the arithmetic of a forward, which together bound its time."""

import statistics
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from networks import CLASSES, Setup, forward_inputs, latent_shape
from timing import milliseconds

RUNS, WARM = 10, 3
META = torch.device("meta")
fp8_product: Any = vars(torch)["_scaled_mm"]  # torch has no public product of fp8


def measure_ceilings(setup: Setup) -> dict[str, float]:
    """TFLOP/s of one large product in bf16 and, if supported, fp8; GB/s of a copy, read and written."""
    device, side = setup.device, setup.product
    a, b = (torch.randn(side, side, device=device).to(setup.dtype) for _ in range(2))
    measured = {"bf16_tflops": 2 * side**3 / _best(lambda: a @ b, device) / 1e12}
    if has_fp8(device):
        quantised = [t.to(torch.float8_e4m3fn) for t in (a, b)]
        unit_scale = torch.ones((), device=device)

        def product() -> Any:
            return fp8_product(quantised[0], quantised[1].T, unit_scale, unit_scale, out_dtype=setup.dtype)

        measured["fp8_tflops"] = 2 * side**3 / _best(product, device) / 1e12
    source = torch.empty(setup.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured["copy_gb_s"] = 2 * setup.copied / _best(lambda: target.copy_(source), device) / 1e9
    return measured


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _best(call: Any, device: torch.device) -> float:
    """Median seconds of warm runs."""
    milliseconds(call, device, WARM)
    return statistics.median(milliseconds(call, device, RUNS)) / 1000


class Arithmetic:
    """Counter of a forward's floating-point operations that computes nothing."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.of_one, self.network = cache(self._of_one), cache(self._network)

    def __call__(self, kind: str, side: int, rows: int) -> float:
        """TFLOP of a forward of `rows` rows."""
        return rows * self.of_one(kind, side) / 1e12

    def picture(self, side: int, batch: int) -> float:
        """TFLOP of whole pictures with guidance in both stages."""
        c, b = self.setup.steps
        return (
            c * self("stage_c", side, 2 * batch)
            + b * self("stage_b", side, 2 * batch)
            + self("stage_a", side, batch)
        )

    def _network(self, kind: str) -> Any:
        with META:
            return CLASSES[kind].from_config(self.setup.configs[kind]).to(self.setup.dtype).eval()

    def _of_one(self, kind: str, side: int) -> int:
        with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = self.network(kind)
            if kind == "stage_a":
                network.decode(torch.empty(1, *latent_shape(kind, side), device=META, dtype=self.setup.dtype))
            else:
                x, r, conditions = forward_inputs(kind, self.setup, 1, side, META)
                network(x, r, **conditions)
        return counter.get_total_flops()
