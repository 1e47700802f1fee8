"""Our placement interrupted, out of memory and emptied in the middle: nothing in main memory changes, nothing is lost
on the card, and the next run is right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from placement_card import (
    LOAD,
    MINIMUM,
    Card,
    Weights,
    card_for,
    inserted,
    ours,
    same,
    sample,
    sampled,
    scenarios,
    uncounted,
)
from placement_patches import by_core, hooked
from torch.utils._python_dispatch import TorchDispatchMode

SHARES = (0.0, 0.5, 2.0)


class Failing(TorchDispatchMode):
    """Lets the operation of a number fail, counted from 0; counts them."""

    def __init__(self, number: int = -1, error: type[BaseException] = RuntimeError):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.number:
            raise self.error("this one fails")
        return func(*args, **(kwargs or {}))


Run = Callable[[Any], torch.Tensor]


def runs(kind: str) -> dict[str, Run]:
    """What is interrupted: a run with a LoRA, and one with scheduled LoRAs of its prompts.

    Without products: an error in these is logged by ComfyUI's own adapters, which leave the weight as it is.
    """
    return {
        "LoRA": lambda model: sample(kind, by_core(model, whole=True)),
        "hooks": lambda model: sample(
            kind, by_core(model, whole=True), prompts=hooked(kind, model, areas=True, whole=True)
        ),
    }


@contextmanager
def watched(
    kind: str, files: dict[str, Path], share: float
) -> Iterator[tuple[Any, Card, Callable[[], list[str]]]]:
    """Our MODEL, its card with room for that share, and a function that says what is wrong with either just now."""
    with inserted(card_for(1 << 30)) as card:
        model = ours(kind, files[kind], card)
        card.size = int(share * model.model_size() + MINIMUM)
        weights = Weights(model.model)
        mapped = Weights(model.model)

        def wrong() -> list[str]:
            found = []
            if uncounted(card, model):
                found.append(f"{card.now} bytes on the card, {model.loaded_size()} counted")
            for name, value in mapped.values.items():
                if not same(mapped.loaded[name], value):
                    found.append(f"{name} was written to where it was loaded")
            return found

        yield model, card, wrong
        management.unload_all_models()
        changed = weights.changed()
        assert not changed, f"changed in main memory: {changed[:5]}"
        assert card.now == 0, f"{card.now} bytes are left on the card"


def spread(count: int, points: int) -> list[int]:
    """This many numbers below `count`, evenly spread."""
    return sorted({round(number * (count - 1) / (points - 1)) for number in range(points)})


def interrupted(files: dict[str, Path]) -> dict[str, Any]:
    """Runs that end at some operation, of loading, patching or computing, in errors of each kind."""
    errors = (management.InterruptProcessingException, KeyboardInterrupt, torch.OutOfMemoryError)
    results: dict[str, Any] = {}
    for kind, share, name in (
        ("stage_c", 0.0, "LoRA"), ("stage_c", 0.5, "LoRA"), ("stage_c", 2.0, "LoRA"), ("stage_b", 0.5, "LoRA"),
        ("stage_c", 0.5, "hooks"), ("stage_c", 2.0, "hooks"),
    ):  # fmt: skip
        run = runs(kind)[name]
        with watched(kind, files, share) as (model, _, wrong):
            right = run(model)
            management.unload_all_models()
            with Failing() as counted:
                run(model)
            faults, raised = [], 0
            for point, number in enumerate(spread(counted.count, 7)):
                if point % 2:
                    management.unload_all_models()
                error = errors[point % 3]
                try:
                    with Failing(number, error):
                        latent = run(model)
                    faults += [] if same(latent, right) else [f"{number}: another latent"]
                except error:
                    raised += 1
                faults += [f"{number}, {error.__name__}: {fault}" for fault in wrong()]
                if not same(run(model), right):
                    faults.append(f"{number}, {error.__name__}: the next latent differs")
            results[f"{kind}, {share}, {name}"] = {"faults": faults, "raised": raised, "of": counted.count}
    return results


def out_of_memory(files: dict[str, Path]) -> dict[str, Any]:
    """Runs in which an allocation fails, or all from one on; then the host empties the card, and runs again."""
    results: dict[str, Any] = {}
    for kind, share in (("stage_c", 0.5), ("stage_c", 2.0), ("stage_b", 0.0)):
        run = runs(kind)["LoRA"]
        with watched(kind, files, share) as (model, card, wrong):
            right = run(model)
            management.unload_all_models()
            allocations = card.allocations
            run(model)
            count = card.allocations - allocations
            faults, raised = [], 0
            for number in range(count):
                for length in (1, 1000):
                    management.unload_all_models()
                    card.failing = set(range(number, number + length))
                    try:
                        latent = run(model)
                        faults += [] if same(latent, right) else [f"{number}: another latent"]
                    except torch.OutOfMemoryError:
                        raised += 1
                    card.failing = set()
                    faults += [f"{number}, {length} fail: {fault}" for fault in wrong()]
                if not same(run(model), right):
                    faults.append(f"{number}: the next latent differs")
            results[f"{kind}, {share}"] = {"faults": faults, "raised": raised, "allocations": count}
    return results


def emptied(files: dict[str, Path]) -> dict[str, Any]:
    """What the host unloads outside of inference mode, as /free does, in part or wholly; MODELs made there too."""
    results: dict[str, Any] = {}
    for made_inside, share in ((True, 0.5), (True, 2.0), (False, 0.5)):
        with torch.inference_mode(made_inside), watched("stage_c", files, share) as (model, card, wrong):
            faults = []
            for name, run in runs("stage_c").items():
                with torch.inference_mode():
                    right = run(model)
                for asked in (card.now // 3, 1e30):
                    with torch.inference_mode(False), torch.enable_grad():
                        management.free_memory(card.free + asked, LOAD)
                    faults += wrong()
                    with torch.inference_mode():
                        if not same(run(model), right):
                            faults.append(f"{name}: the latent differs after {asked}")
            results[f"{share}, made {'inside' if made_inside else 'outside'}"] = {"faults": faults}
    return results


def begun_again(files: dict[str, Path]) -> dict[str, Any]:
    """Runs whose first attempt is out of memory in the middle of its forwards: another is made, and said."""
    results: dict[str, Any] = {}
    for kind, share in (("stage_c", 2.0), ("stage_b", 0.5)):
        with watched(kind, files, share) as (model, _, wrong):
            right, network = sample(kind, model), model.model.diffusion_model
            faults, told = [], []
            for fails in (0, 1):
                with failing_forward(network, fails):
                    result = sampled(kind, model)
                faults += [] if same(result.latent, right) else [f"{fails}: another latent"]
                faults += [f"{fails}: {fault}" for fault in wrong()]
                told.append(any("ran out of memory" in notice for notice in result.notices))
            results[f"{kind}, {share}"] = {"faults": faults, "told": told}
    return results


@contextmanager
def failing_forward(network: Any, number: int) -> Iterator[None]:
    """A forward, counted from 0, is out of memory."""
    forward, count = network.forward, 0

    def fail(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number + 1:
            raise torch.OutOfMemoryError("this one fails")
        return forward(*arguments, **options)

    network.forward = fail
    try:
        yield
    finally:
        del network.forward


SCENARIOS = {
    "begun again": begun_again,
    "interrupted": interrupted,
    "out of memory": out_of_memory,
    "emptied": emptied,
}


def measure() -> dict[str, Any]:
    return scenarios(SCENARIOS)
