"""The device's own speed: what all else is held against."""

from typing import Any

from bench import Bench
from machine import print_table

NAMES = {
    "bf16_tflops": "product of 8192³ in bf16, TFLOP/s",
    "fp8_tflops": "product of 8192³ in fp8, TFLOP/s",
    "copy_gb_s": "copy within the device, GB/s read and written",
}


def measure(bench: Bench) -> dict[str, Any]:
    return bench.ceilings


def report(found: dict[str, Any]) -> None:
    print_table(["ceiling", "measured"], [[NAMES[name], f"{value:,.0f}"] for name, value in found.items()])
