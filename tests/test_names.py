"""Names: one word for one thing. No two public classes of the core share a name, and no abandoned name is used again.

A name counts where it is defined: a module (`name.py`, also a package), a class, a function, an attribute or a
constant of a module.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cascade_core", "nodes", "headless", "demo", "benchmarks")

# Room -> {old name: the name that stands for it}. "": all rooms. A word that is plain English elsewhere is listed with
# the room in which it meant something of its own.
RENAMED: dict[str, dict[str, str]] = {
    "": {
        "Fast": "Engine",
        "FastDecoder": "DecoderEngine",
        "Given": "RunCache",
        "Missing": "RunCache",
        "Walk": "ForwardState",
        "Session": "ShapeCache",
        "Latest": "LRU",
        "Operand": "PackedWeight",
        "Passes": "GraphedFunction",
        "waiting_room": "reduction_workspace",
        "Arrival": "Transfer",
        "Arrivals": "Transfer",
        "Supply": "Loader",
        "slab": "device_buffer",
        "hold_stream": "scale_residual_stream",
        "placing.py": "bucketing.py",
        "Placed": "BucketedPicture",
        "making_hints.py": "hints.py",
        "drawing_masks.py": "masks.py",
        "live_text.py": "trainable_text.py",
        "share_at_start": "pure_noise_share",
        "largest_weight": "max_loss_weight",
        "own_path": "on_policy_share",
        "start_latent": "add_noise",
        "keep_outside": "masked_denoise",
        "Watch": "Stopwatch",
        "Sampled": "SamplingResult",
    },
    "cascade_core/networks": {
        "over": "divide",
        "scaled": "divided_bias",
        "tile": "tile_positions",
    },
    "cascade_core/engine": {
        "make": "pack",
        "made": "packed",
        "own": "float32_copy",
        "after": "deferred_bias",
        "still": "static_input",
        "recording": "capture",
        "recorded": "captured",
        "MANY": "LONG_SEQUENCE",
        "FIVE": "HOPPER_ATTENTION",
        "hold": "load_…",
        "release": "store_…",
        "LAP": "ROUND",
    },
    "cascade_core/placement": {
        "working": "workspace_bytes",
        "room": "free_bytes",
        "held": "graph_bytes",
        "once": "single_use",
        "staying": "resident_share",
        "home": "host_tensors",
        "stand_in": "swap_parameter",
        "mark": "event",
        "tell": "notify",
    },
    "cascade_core/training": {
        "strict.py": "typed_yaml.py",
        "exact.py": "determinism.py",
        "recompute.py": "gradient_checkpointing.py",
        "order.py": "epochs.py",
        "rows.py": "bucket_data.py",
        "clip_norm": "max_grad_norm",
        "places": "student_steps",
        "number": "step",
    },
    "cascade_core/diffusion": {"scale": "alpha_sigma"},
    "cascade_core/adapters": {
        "fit.py": "compatibility.py",
        "check_fit": "check_shape",
        "check_finite": "check_finite_changes",
        "scaled": "exact_product",
        "stepped": "apply_steps",
    },
    "nodes": {
        "Run": "SamplingRun",
        "least": "min_latent_side",
        "tile": "tile_pixels or tile_positions",
        "tell": "notify",
    },
    "benchmarks": {
        "parts.py": "measurements",
        "held.py": "limited_memory.py",
        "bench.py": "context.py",
        "loop.py": "picture.py",
    },
}


def sources(room: str) -> Iterator[Path]:
    for folder in (room,) if room else ROOMS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def definitions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of all that a file defines, and its own name at line 0."""
    yield f"{(path.parent if path.name == '__init__.py' else path).stem}.py", 0
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                for target in assigned(statement):
                    if isinstance(target, ast.Name):
                        yield target.id, target.lineno
        for target in assigned(node):
            if isinstance(target, ast.Attribute):
                yield target.attr, target.lineno


def assigned(node: ast.AST) -> Iterator[ast.expr]:
    targets = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def public_classes(body: list[ast.stmt]) -> Iterator[ast.ClassDef]:
    """Classes of a module and within its classes; one inside a function is not public."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public_classes(node.body)


def test_no_two_public_classes_of_the_core_share_a_name():
    places = defaultdict(list)
    for path in sources("cascade_core"):
        for node in public_classes(ast.parse(path.read_text("utf-8")).body):
            places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("room", RENAMED)
def test_no_name_that_was_given_up_is_back(room):
    names = RENAMED[room]
    back = [
        f"{path.relative_to(ROOT)}:{line}: {name}, now {names[name.lstrip('_')]}"
        for path in sources(room)
        for name, line in definitions(path)
        if name.lstrip("_") in names
    ]
    assert not back, "\n".join(back)
