"""Where the time of one forward by the engine goes: kernels by kind, and the longest."""

import re
import statistics
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench import Bench
from machine import print_table
from networks import TITLES
from parts.forward import call_of
from timing import milliseconds, synchronise

LONGEST, NAME = 25, 70
# What a kernel's name says of its kind: the first that is found in it.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "product": r"gemm|nvjet|cutlass|xmma|wgmma|matmul|_mm_|mma_|splitk|addmm|::mm|linear|product",
    "convolution": r"conv(?!ert)|depthwise",
    "copy": r"memcpy|memset|copy|catarray",
}
OTHER = "element-wise"
STAGES = ("stage_c", "stage_b")


def measure(bench: Bench) -> dict[str, Any]:
    found = {}
    for name in bench.ours.names()[1:]:
        program = bench.ours.program(name)
        for kind in STAGES:
            with bench.apart(f"profile, {TITLES[kind]}, {name}"):
                found[f"{TITLES[kind]}, {name}"] = _profiled(call_of(program, kind, bench), bench)
    return found


def _profiled(call: Any, bench: Bench) -> dict[str, Any]:
    device = bench.setup.device
    runs = min(bench.setup.runs, 3)
    milliseconds(call, device, runs)
    wall = statistics.median(milliseconds(call, device, bench.setup.runs))
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


def report(found: dict[str, Any]) -> None:
    for title, of in found.items():
        kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in of["kinds_ms"].items())
        print(
            f"{title}: {of['wall_ms']:.2f} ms, kernels {of['kernel_ms']:.2f} in {of['launches']:.0f} launches: {kinds}"
        )
        rows = [
            [
                kernel["name"][:NAME],
                kernel["kind"],
                f"{kernel['count']:.0f}",
                f"{kernel['ms']:.3f}",
                f"{1000 * kernel['ms'] / max(kernel['count'], 1):.1f}",
            ]
            for kernel in of["kernels"]
        ]
        print_table(["kernel", "kind", "count", "ms", "µs each"], rows)
        print()
