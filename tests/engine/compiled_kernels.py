"""Compiles what usual forwards launch on a card, without the card, and prints what each kernel came to.

    python -m cascade_nodes.tests.engine.compiled_kernels 8.6 --cover

A program of its own: the tests beside it interpret kernels, and a process does either. One line of JSON a kernel.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
import triton

from cascade_nodes.cascade_core.engine import Precision, operations_on
from cascade_nodes.cascade_core.engine.card import Card, described
from cascade_nodes.cascade_core.engine.kernels import products
from cascade_nodes.cascade_core.engine.kernels.described import compile_for
from cascade_nodes.cascade_core.engine.kernels.tuned import TABLE, choose, device_key, for_device
from cascade_nodes.cascade_core.engine.usual_forwards import usual_forward
from cascade_nodes.cascade_core.networks.config import StageAConfig, StageBConfig, StageCConfig

CARDS = [
    Card((7, 0), "Tesla V100-SXM2-16GB", 80),
    Card((7, 5), "Tesla T4", 40),
    Card((8, 0), "NVIDIA A100-SXM4-40GB", 108),
    Card((8, 6), "NVIDIA GeForce RTX 3060", 28),
    Card((8, 9), "NVIDIA GeForce RTX 4090", 128),
    Card((9, 0), "NVIDIA H200", 132),
    Card((10, 0), "NVIDIA B200", 148),
    Card((12, 0), "NVIDIA GeForce RTX 5090", 170),
]
EXACT: list[Precision] = ["exact"]
OPERANDS = {  # of a product, by the end of its name in the table of the fastest
    "_e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "_int8": (torch.bfloat16, torch.int8),
    "": (torch.bfloat16, torch.bfloat16),
}
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
LITE_C = replace(StageCConfig(), c_cond=1536, c_hidden=(1536, 1536), nhead=(24, 24))
LITE_B = replace(
    StageBConfig(),
    c_hidden=(320, 576, 1152, 1152),
    nhead=(-1, 9, 18, 18),
    blocks=((2, 4, 14, 4), (4, 14, 4, 2)),
)


def usual(card: Card) -> Iterator[tuple[str, Any]]:
    """A name and a forward for every network and precision that the engine computes on the card."""
    native = torch.bfloat16 if card.capability >= (8, 0) else torch.float16
    for dtype in (torch.bfloat16, torch.float16):
        for precision in precisions(card) if dtype == native else EXACT:
            for config in (StageCConfig(), StageBConfig()):
                yield f"{type(config).__name__} {dtype} {precision}", usual_forward(config, dtype, precision)
        yield f"StageAConfig {dtype}", usual_forward(StageAConfig(), dtype)


def unusual(card: Card) -> Iterator[tuple[str, Any]]:
    """Other published networks, sizes and batches."""
    for dtype in (torch.bfloat16, torch.float16):
        for precision in precisions(card):
            for config in (StageCConfig(), StageBConfig(), LITE_C, LITE_B):
                for size, batch in (((1024, 1024), 1), ((1536, 1152), 2), ((2048, 2048), 2), ((512, 768), 8)):
                    name = f"{config} {dtype} {precision} {size} {batch}"
                    yield name, usual_forward(config, dtype, precision, size, batch)
        yield f"StageAConfig {dtype}", usual_forward(StageAConfig(), dtype, size=(2048, 2048))


def tuned(card: Card) -> Iterator[tuple[str, Any]]:
    """Every product of the table of the fastest that is chosen on the card."""
    for op, winners in for_device(json.loads(TABLE.read_text(encoding="utf-8")), device_key(card)).items():
        for size in winners:
            m, n, k = map(int, size.split("x"))
            yield f"{op} {size}", lambda op=op, m=m, n=n, k=k: multiply(op, m, n, k)


def multiply(op: str, m: int, n: int, k: int) -> None:
    config = choose(op, m, n, k, "meta")
    if config is None:
        return
    name, suffix = next((op.removesuffix(end), end) for end in OPERANDS if op.endswith(end))
    x_type, w_type = OPERANDS[suffix]
    x, w = empty(m, k, dtype=x_type), empty(n, k, dtype=w_type)
    out, bias = empty(m, n), empty(n)
    scales: dict[str, Any] = (
        {} if w_type == torch.bfloat16 else {"column_scale": empty(n, dtype=torch.float32)}
    )
    if x_type != torch.bfloat16:
        scales["row_scale"] = empty(m, dtype=torch.float32)
    if name == "linear_gelu_response":
        partial = empty(1, products.response_chunks(m, config), n, dtype=torch.float32)
        products.linear_gelu_response(x, w, bias, m, out, partial, config, **scales)
    elif name == "add_linear":
        products.add_linear(x, w, out, config, **scales)
    else:
        getattr(products, name)(x, w, bias, out, config, **scales)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def precisions(card: Card) -> list[Precision]:
    """Precisions with operations of their own on a card; elsewhere weights are dequantised."""
    with described(card):
        exact = operations_on(torch.device("meta"))
        own = [name for name in get_args(Precision) if operations_on(torch.device("meta"), name) is not exact]
    return ["exact", *own]


class Covering:
    """Triton's hook before a kernel is compiled: every kernel on every card, every form of it on one card at least."""

    def __init__(self, card: Card):
        self.number = CARDS.index(card)
        self.forms: Counter[str] = Counter()

    def __call__(self, *, fn: Any, **_: Any) -> bool:
        """Whether the kernel is left out."""
        number = self.forms[fn.name]
        self.forms[fn.name] += 1
        return number > 0 and number % len(CARDS) != self.number


def report(src: Any, metadata: dict, metadata_group: dict[str, str], times: Any, cache_hit: bool) -> None:
    """Triton's listener, after a kernel is compiled."""
    files = {Path(name).suffix[1:]: Path(path) for name, path in metadata_group.items()}
    ptx = files["ptx"].read_text(encoding="utf-8")
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", files["cubin"]],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout)[-1]
    values = [value for value in src.constants.values() if isinstance(value, int)]
    kernel = {
        "kernel": src.fn.__name__,
        "form": f"{list(src.signature.values())} {values}",
        "dot": "tt.dot" in files["ttir"].read_text(encoding="utf-8"),
        "instructions": [name for name in MATRIX_INSTRUCTIONS if name in ptx],
        "registers": int(registers),
        "spilled": int(stack),  # bytes a thread
        "shared": metadata["shared"],
        "threads": 32 * metadata["num_warps"],
        "cooperative": metadata["launch_cooperative_grid"],
        "seconds": round(times.total / 1e6, 2),
    }
    sys.stdout.write(json.dumps(kernel) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability")
    parser.add_argument(
        "--cover", action="store_true", help="leave out forms that another card's run compiles"
    )
    parser.add_argument("--unusual", action="store_true", help="other networks, sizes and batches, too")
    arguments = parser.parse_args()
    card = next(card for card in CARDS if arguments.capability == "{}.{}".format(*card.capability))
    triton.knobs.compilation.listener = report
    triton.knobs.runtime.jit_cache_hook = Covering(card) if arguments.cover else None
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for name, forward in chain(usual(card), tuned(card), unusual(card) if arguments.unusual else ()):
            sys.stderr.write(name + "\n")
            compile_for(card, forward)


if __name__ == "__main__":
    main()
