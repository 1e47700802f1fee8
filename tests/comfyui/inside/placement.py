"""Our placement under ComfyUI's memory manager, on a card in main memory: what it is asked, takes and gives back."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comfy.model_management as management
import comfy.model_patcher
from comparing import relative
from placement_card import (
    LOAD,
    MINIMUM,
    OFFLOAD,
    RESERVED,
    Card,
    Weights,
    card_for,
    core,
    inserted,
    logged,
    ours,
    same,
    sample,
    scenarios,
    uncounted,
)  # fmt: skip
from placement_patches import by_core
from torch import nn

KINDS = ("stage_c", "stage_b")
ASKED = (
    "model_patches_models", "is_clone", "is_dynamic", "detach", "current_loaded_device", "model_size", "loaded_size",
    "model_patches_to", "partially_load", "partially_unload", "unpatch_model", "patch_model", "load", "pre_run",
    "prepare_state", "apply_hooks", "cleanup",
)  # fmt: skip


@contextmanager
def recorded(patcher: Any) -> Iterator[list[str]]:
    """Writes down what a patcher and its clones are asked, without what they ask themselves."""
    calls: list[str] = []
    depth = 0

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            shown = {
                "detach": f"({args[0] if args else kwargs.get('unpatch_all', True)})",
                "model_patches_to": f"({type(args[0]).__name__ if args else ''})",
            }
            if depth == 0:
                calls.append(name + shown.get(name, ""))
            depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1

        return call

    names = [name for name in ASKED if hasattr(patcher, name)]

    def record(patcher: Any) -> Any:
        for name in names:
            setattr(patcher, name, wrap(name, getattr(patcher, name)))
        clone = patcher.clone
        patcher.clone = lambda *args, **kwargs: record(clone(*args, **kwargs))
        return patcher

    record(patcher)
    yield calls
    for name in (*names, "clone"):
        delattr(patcher, name)


def order_of_calls(files: dict[str, Path]) -> dict[str, Any]:
    """Calls in a first run, a second run and an eviction: those of ComfyUI's own patcher, and where ours differ."""
    orders = {}
    for name in ("core's", "ours"):
        with inserted(card_for(1 << 30)) as card:
            model = (
                core("stage_c", files["stage_c"])
                if name == "core's"
                else ours("stage_c", files["stage_c"], card)
            )
            with recorded(model) as calls:
                for run in ("first", "second"):
                    calls.clear()
                    sample("stage_c", model)
                    orders[name, run] = list(calls)
                calls.clear()
                management.free_memory(card.free + 1000, LOAD)
                orders[name, "a part leaves"] = list(calls)
                calls.clear()
                management.unload_all_models()
                orders[name, "all leaves"] = list(calls)
    runs = [run for name, run in orders if name == "core's"]
    return {run: orders["core's", run] for run in runs} | {
        "ours differs": {
            run: orders["ours", run] for run in runs if orders["ours", run] != orders["core's", run]
        }
    }


def budgets(files: dict[str, Path]) -> dict[str, Any]:
    """Loads the network with room for each share of it, twice; then frees a part, and then all."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        rows = []
        with inserted(Card(1 << 40)) as card:
            model = ours(kind, files[kind], card)
            weights = Weights(model.model)
            size = model.model_size()
            results[f"{kind}, patched"] = [
                patched_loads(by_core(model), share) for share in (-0.5, 0.3, 0.6, 0.9)
            ]
            for share in (-0.5, 0.0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.9, 0.99, 1.01, 1.2, 1e9):
                for asked in (1, 0.02 * size, 0.3 * size, 0.8 * size):
                    room = share * size
                    gained = model.partially_load(LOAD, room)
                    row: dict[str, Any] = {"share": share, "room": room, "gained": gained, "asked": asked}
                    row |= {
                        "loaded": model.loaded_size(),
                        "on the card": card.now,
                        "device": str(model.model.device),
                    }
                    allocations, copied = card.allocations, card.copied
                    row["gained again"] = model.partially_load(LOAD, room - model.loaded_size())
                    row["moved again"] = card.allocations - allocations, card.copied - copied
                    row["loaded again"] = model.loaded_size()
                    row["freed"] = model.partially_unload(OFFLOAD, asked)
                    row["left"], row["left on the card"] = model.loaded_size(), card.now
                    model.detach()
                    row["after detaching"] = model.loaded_size(), card.now, str(model.model.device)
                    rows.append(row)
            results[f"{kind}, changed"] = weights.changed()
        results[kind] = rows
    return results


def patched_loads(model: Any, share: float) -> dict[str, Any]:
    """Loads a MODEL with a LoRA, whose factors stay on the card, twice with the same room, then as a whole."""
    room = share * model.model_size()
    model.partially_load(LOAD, room)
    loaded, factors = model.loaded_size(), factors_on_card(model)
    model.partially_load(LOAD, room - loaded)
    again, copied = model.loaded_size(), factors_on_card(model)
    model.partially_load(LOAD, 1e32)
    whole = factors_on_card(model)
    model.detach()
    return {
        "room": room,
        "loaded": loaded,
        "again": again,
        "factors": len(factors),
        "factors copied again": sum(each is not other for each, other in zip(copied, factors, strict=True)),
        "factors of the whole": len(whole),
    }


def factors_on_card(model: Any) -> list[Any]:
    """The steps of patched weights whose factors are kept on the card."""
    patched = model.model.residence._patched.values()
    return [weight._steps_there for weights in patched for weight in weights.values() if weight.device_bytes]


def through_the_manager(files: dict[str, Path]) -> dict[str, Any]:
    """Runs on cards from too small to large enough: what is loaded, what is left for inference, the latent."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        rows = []
        latents = []
        for share in (-1.0, 0.2, 0.6, 0.9, 3.0):
            card = Card(1 << 40)
            with inserted(card):
                model = ours(kind, files[kind], card)
                card.size = int(share * model.model_size() + MINIMUM)
                latents.append(sample(kind, model))
                row = {"share": share, "loaded": model.loaded_size(), "on the card": card.now}
                allocations, copied = card.allocations, card.copied
                latents.append(sample(kind, model))
                row["moved again"] = card.allocations - allocations
                row["left"] = card.free - MINIMUM
                row["copied again"] = round((card.copied - copied) / model.model_size(), 2)
                rows.append(row)
        results[kind] = rows
        results[f"{kind}, latents"] = sum(not same(latent, latents[-1]) for latent in latents)
    return results


def in_turn(files: dict[str, Path]) -> dict[str, Any]:
    """Runs two networks in turn on a card that holds the larger of them; each latent must be as alone."""
    with inserted(card_for(1 << 30)) as card:
        models = {kind: ours(kind, files[kind], card) for kind in KINDS}
        weights = [Weights(model.model) for model in models.values()]
        alone = {}
        for kind in KINDS:
            alone[kind] = sample(kind, models[kind])
            management.unload_all_models()
        card.size = int(1.3 * max(model.model_size() for model in models.values()) + MINIMUM)
        rows, wrong = [], 0
        for kind in (*KINDS, *KINDS, *KINDS[::-1]):
            wrong += not same(sample(kind, models[kind]), alone[kind])
            loaded = {each: models[each].loaded_size() / models[each].model_size() for each in KINDS}
            rows.append(
                {
                    "run": kind,
                    **loaded,
                    "free": card.free - MINIMUM,
                    "uncounted": uncounted(card, *models.values()),
                }
            )
        management.unload_all_models()
        changed = [name for each in weights for name in each.changed()]
        return {"rows": rows, "wrong": wrong, "changed": changed, "left": card.now}


class Foreign(comfy.model_patcher.ModelPatcher):
    """Somebody else's MODEL of so many bytes, whose memory on the card is counted; it leaves as it is asked to."""

    def __init__(self, card: Card, size: int, dynamic: bool = False):
        super().__init__(nn.Linear(1, 1), LOAD, OFFLOAD, size=size)
        self.model.model_config = None
        self.card, self.dynamic = card, dynamic
        self.asked: list[int] = []

    def is_dynamic(self) -> bool:
        return self.dynamic

    def _take(self, loaded: float) -> None:
        self.card.ballast += int(loaded) - self.model.model_loaded_weight_memory
        self.model.model_loaded_weight_memory = int(loaded)

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        self._take(min(self.size, max(before + extra_memory, 0)))
        self.model.device = device_to
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: Any, memory_to_free: float = 0, *ignored: Any, **options: Any
    ) -> int:
        self.asked.append(int(memory_to_free))
        before = self.loaded_size()
        self._take(max(before - memory_to_free, 0))
        return before - self.loaded_size()

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.asked.append(-1)
            self._take(0)
            self.model.device = self.offload_device
        return self.model

    def model_dtype(self) -> None:
        return None

    def model_patches_to(self, device: Any) -> None:
        pass


def with_foreign(files: dict[str, Path]) -> dict[str, Any]:
    """Somebody else's MODEL before, between and after ours, on a card that holds one and a half of ours."""
    results = {}
    for dynamic in (False, True):
        if dynamic and not hasattr(comfy.model_patcher.ModelPatcher, "is_dynamic"):
            continue
        with inserted(card_for(1 << 30)) as card:
            model = ours("stage_c", files["stage_c"], card)
            weights = Weights(model.model)
            right = sample("stage_c", model)
            size = model.model_size()
            card.size = int(1.5 * size + MINIMUM)
            foreign = Foreign(card, int(1.1 * size), dynamic)
            rows, wrong = [], 0
            for run in ("its", "ours") * 2:
                foreign.asked.clear()
                if run == "its":
                    management.load_models_gpu([foreign])
                else:
                    wrong += not same(sample("stage_c", model), right)
                rows.append({
                    "run": run, "ours": model.loaded_size() / size, "its": foreign.loaded_size() / foreign.size,
                    "free": card.free - MINIMUM, "uncounted": uncounted(card, model), "asked": foreign.asked[:],
                })  # fmt: skip
            management.unload_all_models()
            results["dynamic" if dynamic else "static"] = {
                "rows": rows,
                "wrong": wrong,
                "changed": weights.changed(),
            }
    return results


def lives(files: dict[str, Path]) -> dict[str, Any]:
    """Lets clones and MODELs die while they are loaded."""
    results: dict[str, Any] = {}
    for share in (0.4, 2.0):
        with inserted(card_for(1 << 30)) as card, logged() as lines:
            gc.collect()
            gc.disable()
            try:
                model = ours("stage_c", files["stage_c"], card)
                card.size = int(share * model.model_size() + MINIMUM)
                first = sample("stage_c", model)
                clone = by_core(model)
                sample("stage_c", clone)
                del clone
                results[f"{share}, a clone died"] = {
                    "uncounted": uncounted(card, model),
                    "of the manager": [loaded.model is model for loaded in management.current_loaded_models],
                    "freed": freed(card, 1000),
                    "as before": same(sample("stage_c", model), first),
                }
                for name in ("after a run", "after an error", "after an eviction"):
                    sample("stage_c", by_core(model))
                    if name == "after an error":
                        fail(model)
                    if name == "after an eviction":
                        management.free_memory(card.free + card.now // 2, LOAD)
                    before = card.now
                    del model
                    results[f"{share}, all died {name}"] = {"before": before, "left": card.now}
                    model = ours("stage_c", files["stage_c"], card)
                    sample("stage_c", model)
                del model
                management.free_memory(1e30, LOAD)
                results[f"{share}, log"] = [line for line in lines if "leak" in line]
            finally:
                gc.enable()
    return results


def freed(card: Card, asked: int) -> bool:
    """Whether the manager frees `asked` bytes beyond those already free."""
    wanted = card.free + asked
    management.free_memory(wanted, LOAD)
    return card.free >= wanted


def fail(model: Any) -> None:
    """A run that ends in an error of a block."""

    def raises(*_: Any) -> None:
        raise RuntimeError

    hook = model.model.diffusion_model.network.up_blocks[0][0].register_forward_hook(raises)
    with suppress(RuntimeError):
        sample("stage_c", model)
    hook.remove()


def other_device(files: dict[str, Path]) -> dict[str, Any]:
    """`load_device` set to the processor after the MODEL was loaded, of itself or of a clone, and back."""
    results = {}
    for which in ("itself", "a clone"):
        for share in (0.4, 2.0):
            with inserted(card_for(1 << 30)) as card:
                model = ours("stage_c", files["stage_c"], card)
                weights = Weights(model.model)
                card.size = int(share * model.model_size() + MINIMUM)
                patched = by_core(model)
                right = sample("stage_c", patched)
                if which == "a clone":
                    patched = patched.clone()
                patched.load_device = OFFLOAD
                result = {"on the processor": relative(sample("stage_c", patched), right), "left": card.now}
                if which == "a clone":
                    patched = patched.clone()
                patched.load_device = LOAD
                result["back"] = relative(sample("stage_c", patched), right)
                result["uncounted"] = uncounted(card, patched)
                management.unload_all_models()
                results[f"{which}, {share}"] = {**result, "changed": len(weights.changed())}
    return results


def states(files: dict[str, Path]) -> dict[str, Any]:
    """Runs with the manager set up by --novram, --lowvram, --highvram, --disable-smart-memory or --reserve-vram."""
    results = {}
    state = management.VRAMState
    settings: dict[str, dict[str, Any]] = {
        "none": {"vram_state": state.NORMAL_VRAM},
        "novram": {"vram_state": state.NO_VRAM},
        "lowvram": {"vram_state": state.LOW_VRAM},
        "highvram": {"vram_state": state.HIGH_VRAM},
        "disable-smart-memory": {"DISABLE_SMART_MEMORY": True},
        "reserve-vram": {"extra_reserved_memory": lambda: RESERVED + MINIMUM},
    }
    right = None
    for name, values in settings.items():
        with inserted(card_for(1 << 30)) as card, patch.multiple(management, **values):
            offload = management.unet_offload_device()
            model = ours("stage_c", files["stage_c"], card, offload=offload)
            card.size = int(2 * MINIMUM + (1.2 if name == "highvram" else 0.5) * model.model_size())
            if name != "reserve-vram":
                card.ballast = MINIMUM
            found = [sample("stage_c", by_core(model)) for _ in range(2)]
            right = found[0] if right is None else right
            allocations = card.allocations
            same_latents = [same(one, right) for one in found]
            sample("stage_c", by_core(model))
            results[name] = {
                "loaded": round(model.loaded_size() / model.model_size(), 2), "uncounted": uncounted(card, model),
                "same": same_latents, "moved again": card.allocations - allocations, "free": card.free,
            }  # fmt: skip
    return results


SCENARIOS = {
    "order of calls": order_of_calls,
    "budgets": budgets,
    "through the manager": through_the_manager,
    "in turn": in_turn,
    "with foreign": with_foreign,
    "lives": lives,
    "other device": other_device,
    "states": states,
}


def measure() -> dict[str, Any]:
    return scenarios(SCENARIOS)
