"""Profile of one forward by the engine: time by kind of kernel, and the longest kernels."""

import re
import statistics
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from context import Context
from machine import print_table
from measurements.forward import call_of
from networks import TITLES
from timing import milliseconds, synchronise

LONGEST, NAME = 25, 70
# Kind of a kernel by its name: the first pattern that matches.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "product": r"gemm|nvjet|cutlass|xmma|wgmma|matmul|_mm_|mma_|splitk|addmm|::mm|linear|product",
    "convolution": r"conv(?!ert)|depthwise",
    "copy": r"memcpy|memset|copy|catarray",
}
OTHER = "element-wise"
STAGES = ("stage_c", "stage_b")


def measure(context: Context) -> dict[str, Any]:
    profiles = {}
    for name in context.ours.names()[1:]:
        program = context.ours.program(name)
        for kind in STAGES:
            with context.isolated(f"profile, {TITLES[kind]}, {name}"):
                profiles[f"{TITLES[kind]}, {name}"] = _profiled(call_of(program, kind, context), context)
    return profiles


def _profiled(call: Any, context: Context) -> dict[str, Any]:
    device = context.setup.device
    runs = min(context.setup.runs, 3)
    milliseconds(call, device, runs)
    wall = statistics.median(milliseconds(call, device, context.setup.runs))
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            call()
        synchronise(device)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type.name == ("CUDA" if cuda else "CPU"):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total  # µs
            kernels.append({"name": event.key, "ms": spent / 1000 / runs, "count": event.count / runs})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    kinds: Counter[str] = Counter()
    for kernel in kernels:
        kernel["kind"] = kind_of(kernel["name"])
        kinds[kernel["kind"]] += kernel["ms"]
    return {
        "wall_ms": wall,
        "kernel_ms": sum(kinds.values()),
        "launches": sum(kernel["count"] for kernel in kernels),
        "kinds_ms": dict(kinds.most_common()),
        "kernels": kernels[:LONGEST],
    }


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), OTHER)


def report(profiles: dict[str, Any]) -> None:
    for title, profiled in profiles.items():
        kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in profiled["kinds_ms"].items())
        print(
            f"{title}: {profiled['wall_ms']:.2f} ms, kernels {profiled['kernel_ms']:.2f} "
            f"in {profiled['launches']:.0f} launches: {kinds}"
        )
        rows = [
            [
                kernel["name"][:NAME],
                kernel["kind"],
                f"{kernel['count']:.0f}",
                f"{kernel['ms']:.3f}",
                f"{1000 * kernel['ms'] / max(kernel['count'], 1):.1f}",
            ]
            for kernel in profiled["kernels"]
        ]
        print_table(["kernel", "kind", "count", "ms", "µs each"], rows)
        print()
