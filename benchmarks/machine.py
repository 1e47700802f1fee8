"""Description of the machine that a benchmark ran on, and tables for its numbers."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def describe_machine() -> str:
    """Processor, cores, memory and versions on one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = [f"{_processor()}, {cores} cores", f"{_memory() / 2**30:.0f} GiB", platform.system()]
    return ", ".join([*hardware, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table, padded for the terminal: a column of text, then columns of numbers."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (head, rule, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(cells)} |")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
