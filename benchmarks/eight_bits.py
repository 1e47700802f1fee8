"""Stage C and B in bf16, fp8 and int8, before and after, in one process: forwards of two rows at 1024 × 1024.

Each variant's forward is a CUDA graph, and variants take turns, so that a card that slows down does so for all.
Besides times, it reports the error against float32, the slowest kernels, and tile configurations of the products that
take most time (`--table FILE`: the fastest, in the form of the engine's tuned.json, with which further variants are
timed). A variant that fails is reported and does not affect the others; results are written as they come.

    python benchmarks/eight_bits.py --json FILE [--table FILE] [--seconds 180]
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cascade_nodes.cascade_core.engine import Engine, cuda, fp8, int8
from cascade_nodes.cascade_core.engine import engine as engine_module
from cascade_nodes.cascade_core.engine.card import card_of
from cascade_nodes.cascade_core.engine.kernels import products, tuned
from cascade_nodes.cascade_core.engine.kernels.fp8 import (
    apply_response_quantise,
    quantise_rows,
    quantised_linear,
)
from cascade_nodes.cascade_core.engine.kernels.int8 import dequantise
from cascade_nodes.cascade_core.engine.kernels.tuned import CUBLAS, Config, device_key
from cascade_nodes.cascade_core.engine.workspace import empty
from cascade_nodes.cascade_core.networks.quantisation import E4M3, INT8, quantise, quantise_network
from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table
from networks import forward_inputs, full, random_network
from product_cases import CACHE, CALLS, REPLAYS
from timing import relative_error

SIDE, ROWS, ROUNDS, PER_ROUND = 1024, 2, 6, 5
PRODUCTS = [  # (op, rows, out, K) of the most frequent blocks: Stage B's third level, then Stage C
    ("add_linear", 2048, 1280, 5120),
    ("linear", 2048, 5120, 1280),
    ("linear", 2048, 3840, 1280),
    ("add_linear", 2048, 1280, 1280),
    ("add_linear", 1152, 2048, 8192),
    ("linear", 1152, 8192, 2048),
    ("linear", 1152, 6144, 2048),
    ("add_linear", 1152, 2048, 2048),
    ("add_linear", 512, 1280, 5120),
    ("linear", 512, 5120, 1280),
    ("add_linear", 8192, 640, 2560),
    ("add_linear", 32768, 320, 1280),
]
KINDS = ("e4m3", "int8", "bf16")
KINDS_OF_NETWORKS = ("stage_b", "stage_c")
WRONG = 1e-2  # relative difference from which a product counts as wrong


# fp8 as before: separate kernels quantise rows and add to the residual stream


def _rows(h: Tensor) -> tuple[Tensor, Tensor]:
    return quantise_rows(
        h.flatten(0, 1), empty((h.numel() // h.shape[-1], h.shape[-1]), h, fp8.E4M3), _scales(h)
    )


def _scales(h: Tensor) -> Tensor:
    return empty((h.numel() // h.shape[-1],), h, torch.float32)


def _before(x: Tensor, rows: tuple[Tensor, Tensor], weight: Any, bias: Tensor | None = None) -> Tensor:
    out = empty((*x.shape[:2], len(weight[0])), x)
    quantised_linear(*rows, weight[0], weight[1], bias, out.flatten(0, 1))
    return out


def _channelwise_before(
    x: Tensor, h: Tensor, expand: Any, bias: Tensor, gamma: Tensor, contract: Any, *_: float
) -> None:
    h = _before(h, _rows(h), expand, bias)
    if cuda.fits_registers(h):
        rows = _rows(cuda.gelu_response_norm_(h, gamma))
    else:
        h8 = empty((h.numel() // h.shape[-1], h.shape[-1]), h, fp8.E4M3)
        rows = apply_response_quantise(h, cuda.gelu_response_scale_(h, gamma), h8, _scales(h))
    x.add_(_before(x, rows, contract))


def operations(module: Any, **changed: Any) -> Any:
    """A module's operations, with the given ones replaced."""
    names = {*module.__all__, *(name for name in ("formats", "pack") if hasattr(module, name))}
    return SimpleNamespace(**{**{name: getattr(module, name) for name in names}, **changed})


def variants() -> dict[str, tuple[Any, torch.dtype | None]]:
    """Operations and the format of the weights, by name."""
    before = operations(
        cuda,
        **{name: getattr(fp8, name) for name in ("formats", "pack") if hasattr(fp8, name)},
        project=lambda x, weight, bias: _before(x, _rows(x), weight, bias),
        channelwise_=_channelwise_before,
        add_linear_=lambda x, h, weight: x.add_(_before(x, _rows(h), weight)),
    )
    return {
        "bf16": (cuda, None),
        "fp8 before": (before, torch.float8_e4m3fn),
        "fp8": (fp8, torch.float8_e4m3fn),
        "int8": (int8, torch.int8),
    }


class Forward:
    """A forward of one variant, captured."""

    def __init__(self, kind: str, ops: Any, weights: torch.dtype | None):
        setup = full(torch.device("cuda"))
        network: Any = random_network(kind, setup)
        self.ops = ops
        if weights is not None:
            quantise_network(network, weights)
        self.engine = Engine(network, join=True)  # as a placement joins queries, keys and values
        self.x, noise, conditions = forward_inputs(kind, setup, ROWS, SIDE)
        self.conditions: dict[str, Any] = {**conditions}
        self.noise = noise.cpu()
        self.failures: list[str] = []
        self.engine._fallback.notify = self.failures.append
        for _ in range(4):
            self.out = self()
        if self.failures:
            raise RuntimeError(self.failures[0])
        torch.cuda.synchronize()

    def __call__(self) -> Tensor:
        engine_module.operations_on = lambda device, way="exact": self.ops
        return self.engine(self.x, self.noise, **self.conditions)

    def graph(self) -> torch.cuda.CUDAGraph | None:
        for shape in self.engine._shapes.values():
            graphed = shape._graphed
            if graphed is not None and graphed._captured is not None:
                return graphed._captured.graph
        return None

    def milliseconds(self, count: int) -> list[float]:
        graph = self.graph()
        call = self if graph is None else graph.replay
        call()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def profile(self, count: int = 15) -> list[dict[str, Any]]:
        self()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self()
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)[:count]
        return [
            {"kernel": e.key[:110], "ms": round(e.self_device_time_total / 1000, 3), "launches": e.count}
            for e in events
        ]


def exact(kind: str) -> Tensor:
    """The network itself in float32."""
    setup = full(torch.device("cuda"))
    network = random_network(kind, setup).float()
    x, noise, conditions = forward_inputs(kind, setup, ROWS, SIDE)
    return network(x.float(), noise, **{name: value.float() for name, value in conditions.items()})


def stage(
    kind: str,
    chosen: dict[str, tuple[Any, torch.dtype | None]],
    note: Callable[..., None],
    float32: bool = True,
) -> None:
    """Measures each variant of a network; float32: against the network itself, which needs twice its memory"""
    try:
        expected = exact(kind) if float32 else None
    except Exception as error:
        note(kind, "float32", error=repr(error)[:300])
        expected = None
    torch.cuda.empty_cache()
    forwards: dict[str, Forward] = {}
    for name, (ops, weights) in chosen.items():
        try:
            start = time.perf_counter()
            forwards[name] = Forward(kind, ops, weights)
            error = None if expected is None else relative_error(forwards[name].out, expected)
            seconds = round(time.perf_counter() - start, 1)
            note(kind, name, error=error, graph=forwards[name].graph() is not None, seconds=seconds)
        except Exception as error:
            note(kind, name, failed=repr(error)[:500])
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(ROUNDS):
        for name, forward in forwards.items():
            try:
                times[name] += forward.milliseconds(PER_ROUND)
            except Exception as error:
                note(kind, name, failed=repr(error)[:500])
    for name, forward in forwards.items():
        if times[name]:
            note(kind, name, ms=round(statistics.median(times[name]), 3), least=round(min(times[name]), 3))
        try:
            note(kind, name, profile=forward.profile())
        except Exception as error:
            note(kind, name, unprofiled=repr(error)[:300])


# Tile configurations


def candidates(kind: str) -> Iterator[Config]:
    k = 128 if kind == "e4m3" else 64  # 128 bytes of the wider operand
    yield Config(128, 128, k, warps=8, stages=4, tma=True)
    yield Config(128, 128, k, warps=4, stages=3, tma=True)
    yield Config(128, 128, k, warps=4, stages=3, tma=True, schedule="loop", per_sm=2)
    yield Config(128, 128, k, warps=8, stages=3, tma=True, schedule="loop")
    yield Config(128, 64, k, warps=4, stages=4, tma=True)
    yield Config(64, 128, k, warps=4, stages=4, tma=True)
    yield Config(128, 256, k, warps=8, stages=3, tma=True)
    yield Config(256, 128, k, warps=8, stages=3, tma=True)
    if kind == "int8":
        yield Config(128, 128, 2 * k, warps=8, stages=3, tma=True)
        yield Config(256, 128, k, warps=8, stages=3)


class Tuned:
    """Operands of one product, in each of the ways to compute it."""

    def __init__(self, op: str, kind: str, m: int, n: int, k: int):
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)

        self.kind, self.adds = kind, op == "add_linear"
        self.copies = max(2, min(CALLS, int(CACHE / (n * k * (2 if kind == "bf16" else 1)))))
        self.x, self.bias, self.out, self.change = normal(m, k), normal(n), normal(m, n), normal(m, n)
        self.weights: list[Any] = [normal(n, k).mul_(k**-0.5) for _ in range(self.copies)]
        self.scratch, self.row_scale = self.weights[0].clone(), None
        self.scales: list[Any] = [None] * self.copies
        if kind != "bf16":
            quantised = [quantise(weight, E4M3 if kind == "e4m3" else INT8) for weight in self.weights]
            self.weights, self.scales = map(list, zip(*quantised, strict=True))
        if kind == "e4m3":
            self.x, self.row_scale = quantise_rows(self.x)

    def ours(self, config: Config) -> Callable[[int], Any]:
        def call(i: int) -> None:
            weight, scales = self.weights[i], (self.row_scale, self.scales[i])
            if self.adds:
                products.add_linear(self.x, weight, self.out, config, *scales)
            else:
                products.linear(self.x, weight, self.bias, self.out, config, *scales)

        return call

    def other(self, i: int) -> None:
        """cuBLAS's product, with the separate kernels before it (dequantising) or after it (adding)."""
        weight: Any = self.weights[i]
        if self.kind == "e4m3":
            assert self.row_scale is not None
            bias, out = (None, self.change) if self.adds else (self.bias, self.out)
            quantised_linear(self.x, self.row_scale, weight, self.scales[i], bias, out)
            if self.adds:
                self.out.add_(self.change)
            return
        if self.kind == "int8":
            weight = dequantise(weight, self.scales[i], self.scratch)
        if self.adds:
            self.out.addmm_(self.x, weight.T)
        else:
            torch.addmm(self.bias, self.x, weight.T, out=self.out)

    def result(self, call: Callable[[int], Any]) -> Tensor:
        self.out.fill_(0.5)
        call(0)
        return self.out.clone()

    def microseconds(self, call: Callable[[int], Any]) -> float:
        self.out.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                call(i % self.copies)
        times = []
        for _ in range(REPLAYS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1000 * start.elapsed_time(end) / CALLS)
        return statistics.median(times[1:])

    def winner(self) -> tuple[dict[str, float], Any]:
        """Microseconds of cuBLAS and of each configuration, and the fastest of them."""
        expected = self.result(self.other)
        times: dict[str, float] = {CUBLAS: self.microseconds(self.other)}
        best: Any = CUBLAS
        for config in candidates(self.kind):
            name, call = json.dumps(asdict(config)), self.ours(config)
            try:
                if relative_error(self.result(call), expected) > WRONG:
                    print(f"    wrong: {name}", flush=True)
                    continue
                times[name] = self.microseconds(call)
            except Exception as error:
                print(f"    {type(error).__name__}: {name}", flush=True)
                continue
            if times[name] == min(times.values()):
                best = asdict(config)
        return times, best


class Report:
    """All figures, printed and written as they come."""

    def __init__(self, path: Path, card: str, seconds: float):
        self.path, self.start, self.seconds = path, time.perf_counter(), seconds
        self.results: dict[str, Any] = {"machine": describe_machine(), "device": card, "forwards": {}}

    def late(self, share: float) -> bool:
        return time.perf_counter() - self.start > share * self.seconds

    def save(self) -> None:
        write_file(self.path, json.dumps(self.results, indent=1) + "\n")

    def note(self, kind: str, name: str, **values: Any) -> None:
        self.results["forwards"].setdefault(f"{kind}, {name}", {}).update(values)
        profile = values.pop("profile", [])
        print(kind, name, values or "", flush=True)
        for row in profile:
            print(f"    {row['ms']:8.3f} ms {row['launches']:5d} × {row['kernel']}", flush=True)
        self.save()

    def tune(self) -> dict[str, Any]:
        """The fastest configurations, in the form of a device's entry in tuned.json."""
        winners: dict[str, Any] = {}
        for (op, m, n, k), kind in itertools.product(PRODUCTS, KINDS):
            if self.late(0.8):
                break
            name, size = op if kind == "bf16" else f"{op}_{kind}", f"{m}x{n}x{k}"
            try:
                times, winner = Tuned(op, kind, m, n, k).winner()
            except Exception as error:
                print(name, size, repr(error)[:300], flush=True)
                continue
            winners.setdefault(name, {})[size] = winner
            self.results.setdefault("products", {})[f"{name} {size}"] = times
            least = min(times, key=lambda config: times[config])
            print(f"{name} {size}: cuBLAS {times[CUBLAS]:.1f} µs, {times[least]:.1f} by {least}", flush=True)
            self.save()
        return winners


def use(winners: dict[str, Any], card: Any) -> None:
    """Makes the engine use these configurations from now on."""
    table, key = tuned._table(), device_key(card)
    table[key] = {**tuned.for_device(table, key), **winners}
    tuned._choose.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description="Stage C and B in bf16, fp8 and int8, before and after.")
    parser.add_argument("--json", type=output_file, required=True, help="all figures, written as they come")
    parser.add_argument("--table", type=output_file, help="the winners among the tile configurations")
    parser.add_argument(
        "--seconds", type=float, default=170, help="seconds after which no further part begins"
    )
    options = parser.parse_args()
    card = card_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if card is None:
        raise SystemExit("There is no CUDA device with Triton here.")
    report = Report(options.json, card.name, options.seconds)
    with torch.inference_mode():
        for kind in KINDS_OF_NETWORKS:
            if not report.late(0.5):
                stage(kind, variants(), report.note)
                torch.cuda.empty_cache()
        winners = report.tune()
        if options.table:
            write_file(
                options.table, json.dumps({device_key(card): winners}, indent=1, sort_keys=True) + "\n"
            )
        use(winners, card)
        tuned_ones = {f"{name}, tuned": value for name, value in variants().items() if "before" not in name}
        for kind in KINDS_OF_NETWORKS:
            if not report.late(0.9):
                stage(kind, tuned_ones, report.note, float32=False)
                torch.cuda.empty_cache()
    rows = [
        [name, str(entry.get("ms", entry.get("failed", ""))), str(entry.get("error", ""))]
        for name, entry in report.results["forwards"].items()
    ]
    print_table(["forward", "ms", "error"], rows)


if __name__ == "__main__":
    main()
