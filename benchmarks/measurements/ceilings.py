"""Ceilings of the device, the reference for all other measurements."""

from typing import Any

from context import Context
from machine import print_table

NAMES = {
    "bf16_tflops": "product of 8192³ in bf16, TFLOP/s",
    "fp8_tflops": "product of 8192³ in fp8, TFLOP/s",
    "copy_gb_s": "copy within the device, GB/s read and written",
}


def measure(context: Context) -> dict[str, Any]:
    return context.ceilings


def report(ceilings: dict[str, Any]) -> None:
    print_table(["ceiling", "measured"], [[NAMES[name], f"{value:,.0f}"] for name, value in ceilings.items()])
