"""What patched weights make of a latent, wherever they are: LoRA, hooks, merging and saving, with ComfyUI's own patcher
as the reference.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.model_management as management
import comfy.sd
import torch
from comfy_extras import nodes_lora_extract, nodes_model_merging
from comparing import relative
from interop import only
from placement_card import (
    LOAD,
    MINIMUM,
    Card,
    Weights,
    card_for,
    core,
    inserted,
    ours,
    prompts,
    same,
    sample,
    scenarios,
)
from torch import Tensor

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.cascade_core.adapters import Adapter, LowRank
from cascade_nodes.nodes.hosts.comfyui.adapters import with_adapter

MODEL = "diffusion_model."
LAYERS = ("to_q", "to_v", "out_proj", "channelwise.0", "channelwise.4", "mapper_sca", "depthwise", "clf.1")
SHARES = (2.0, 0.0, 2.0, 0.5)  # of the network's bytes that there is room for, one run after another
FEW = (2.0, 0.0, 0.5)  # where a run takes long
Change = Callable[[Any], Any]


def layers(model: Any) -> dict[str, Tensor]:
    """Weights that the LoRAs change."""
    state = model.model.diffusion_model.state_dict()
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in state.items()
        if name.removesuffix(".weight").endswith(LAYERS)
    }


def lora_tensors(model: Any, seed: int = 5, whole: bool = False) -> dict[str, Tensor]:
    """A LoRA file of ComfyUI's that changes weights in several ways, and biases; whole: without products."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(layers(model).items()):
        prefix = f"lora_unet_{name.replace('.', '_')}"
        rows = len(weight)
        if whole or number % 4 == 3:
            tensors |= {
                f"{prefix}.diff": random(*weight.shape) * 0.02,
                f"{prefix}.diff_b": random(rows) * 0.05,
            }
            continue
        down = random(2, *weight.shape[1:])
        up = random(rows, 2, *[1] * (weight.dim() - 2)) * 0.03
        tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
        if number % 4 == 1 and weight.dim() == 2:
            tensors |= {
                f"{prefix}.dora_scale": random(rows, 1).abs() + 0.5,
                f"{prefix}.alpha": torch.tensor(1.0),
            }
    return tensors


def by_core(model: Any, seed: int = 5, strength: float = 0.75, whole: bool = False) -> Any:
    return only(comfy.sd.load_lora_for_models(model, None, lora_tensors(model, seed, whole), strength, 0))


def by_ours(model: Any, magnitude: str | None = None, strength: float = 0.8) -> Any:
    generator = torch.Generator().manual_seed(17)
    weights = {}
    for name, weight in layers(model).items():
        down = torch.randn(2, *weight.shape[1:], generator=generator) * 0.02
        up = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2), generator=generator)
        sizes = {"row": (len(weight), 1), "column": (1, weight.shape[1])}
        norms = (
            torch.rand(sizes[magnitude], generator=generator) + 0.5
            if magnitude and weight.dim() == 2
            else None
        )
        weights[name] = LowRank(down, up, 2.0, norms)
    return only(with_adapter(model, None, Adapter("lora", "kohya", weights, {}, ()), strength, 0, []))


def scaled(model: Any) -> Any:
    """A MODEL with patches and with its weights at another strength."""
    patched = model.clone()
    names = [f"{MODEL}{name}.weight" for name in layers(model)]
    state = model.model.state_dict()
    torch.manual_seed(23)
    patched.add_patches(
        {name: ("diff", (torch.randn_like(state[name].float()) * 0.02,)) for name in names}, 0.7, 0.9
    )
    return patched


def cast(model: Any) -> Any:
    """A MODEL computed in another precision than its weights, as ModelComputeDtype sets it."""
    patched = by_core(model)
    patched.set_model_compute_dtype(torch.bfloat16)
    return patched


def wrapped(model: Any) -> Any:
    """A MODEL whose weights nodes change whenever they are used."""
    patched = by_core(model)
    for name in layers(model):
        if name.endswith("to_q"):
            patched.add_weight_wrapper(f"{MODEL}{name}.weight", lambda weight: weight * 1.5)
    return patched


CHANGES: dict[str, Change] = {
    "none": lambda model: model,
    "core's LoRA": by_core,
    "two of core's": lambda model: by_core(by_core(model), seed=6, strength=-0.5),
    "ours": by_ours,
    "ours, DoRA of rows": partial(by_ours, magnitude="row"),
    "ours, DoRA of columns": partial(by_ours, magnitude="column"),
    "ours after core's": lambda model: by_ours(by_core(model)),
    "strength_model": scaled,
    "another precision": cast,
    "wrapped weights": wrapped,
}
WITHOUT_OURS = ["none", "core's LoRA", "two of core's", "strength_model"]
CASES = [
    ("stage_c", "fp32", list(CHANGES)),
    ("stage_b", "fp32", WITHOUT_OURS),
    ("stage_c", "bf16", ["none", "core's LoRA", "ours, DoRA of rows"]),
    ("stage_b", "bf16", ["none", "core's LoRA"]),
    ("stage_c", "fp16", ["none", "core's LoRA"]),
    ("stage_c", "fp8", ["none", "core's LoRA", "ours", "wrapped weights"]),
    ("stage_c", "int8", ["none", "two of core's", "another precision"]),
    ("stage_b", "int8", ["none", "core's LoRA", "strength_model"]),
]


@contextmanager
def placed(kind: str, path: Path, dtype: str = "fp32") -> Iterator[tuple[Any, Card, Callable[[float], None]]]:
    """Our MODEL, its card, and a function that leaves room there for so much of the network."""
    with inserted(card_for(1 << 30)) as card:
        model = ours(kind, path, card, dtype)
        whole = card.size
        size = model.model_size()
        weights = Weights(model.model)

        def leave(share: float) -> None:
            """Somebody takes so much of the card that this share of the network has room."""
            card.ballast = int(whole - (card_for(share * size).size))
            management.free_memory(MINIMUM, LOAD)

        yield model, card, leave
        model.detach()
        changed = weights.changed()
        assert not changed, f"changed in main memory: {changed}"
        assert card.now == 0, f"{card.now} bytes are left on the card"


@contextmanager
def reference(kind: str, path: Path, dtype: str = "fp32") -> Iterator[Any]:
    """The MODEL in ComfyUI's own patcher, on a card that holds it whole."""
    with inserted(card_for(1 << 30)):
        yield core(kind, path, dtype)


def compared(found: list[Tensor], right: Tensor) -> dict[str, Any]:
    """Which of what was found differs by a bit from the first, and how far that is from what is right."""
    return {
        "differ": [number for number, one in enumerate(found) if not same(one, found[0])],
        "from core's": relative(found[0].float(), right.float()),
    }


def latents(files: dict[str, Path]) -> dict[str, Any]:
    """Latents of every change of weights."""
    results: dict[str, Any] = {}
    for kind, dtype, names in CASES:
        with reference(kind, files[kind], dtype) as model:
            right = {name: sample(kind, CHANGES[name](model)) for name in names}
        with placed(kind, files[kind], dtype) as (model, _, leave):
            for name in names:
                patched = CHANGES[name](model)
                found, loaded = [], []
                for share in SHARES:
                    leave(share)
                    found.append(sample(kind, patched))
                    loaded.append(round(patched.loaded_size() / patched.model_size(), 2))
                effect = relative(right[name], right["none"])
                results[f"{kind}, {dtype}, {name}"] = {
                    **compared(found, right[name]), "loaded": loaded, "effect": effect,
                }  # fmt: skip
    return results


def in_turn(files: dict[str, Path]) -> dict[str, Any]:
    """Clones of one MODEL in turn, with other weights and shares: each as alone."""
    results = {}
    for kind, names in (
        ("stage_c", ["core's LoRA", "none", "ours", "two of core's"]),
        ("stage_b", WITHOUT_OURS),
    ):
        with reference(kind, files[kind]) as model:
            right = {name: sample(kind, CHANGES[name](model)) for name in names}
        with placed(kind, files[kind]) as (model, _, leave):
            clones = {name: CHANGES[name](model) for name in names}
            wrong = []
            for share in SHARES:
                leave(share)
                wrong += [
                    f"{name} at {share}" for name in (*names, *names[::-1])
                    if relative(sample(kind, clones[name]), right[name]) > 1e-5
                ]  # fmt: skip
            results[kind] = wrong
    return results


def keyframes(*strengths: tuple[float, float]) -> comfy.hooks.HookKeyframeGroup:
    """Hook keyframes of pairs (strength, share of the run from which it holds)."""
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start in strengths:
        group.add(comfy.hooks.HookKeyframe(strength, start))
    return group


def hooked(kind: str, model: Any, areas: bool, whole: bool = False) -> tuple[Any, Any]:
    """Prompts with LoRAs of their own: two groups, one of them scheduled; in two halves of the picture, or not."""
    positive, negative = prompts(kind)
    other, _ = prompts(kind, seed=2)
    groups = [comfy.hooks.create_hook_lora(lora_tensors(model, seed, whole), 0.8, 0) for seed in (5, 6)]
    groups[0].set_keyframes_on_hooks(keyframes((1.0, 0.0), (0.3, 0.4), (0.0, 0.7)))
    groups[1].set_keyframes_on_hooks(keyframes((0.5, 0.0), (1.0, 0.5)))
    sides = [torch.zeros(1, 32, 32) for _ in range(2)]
    sides[0][..., :16] = sides[1][..., 16:] = 1
    conds = [
        comfy.hooks.set_conds_props(
            [one], 1.0, "default", mask=side if areas else None, hooks=group,
            timesteps_range=None if areas else times,
        )[0]
        for one, side, group, times in zip((positive, other), sides, groups, ((0, 0.6), (0.3, 1)), strict=True)
    ]  # fmt: skip
    return [*conds[0], *conds[1]], negative


def hooks(files: dict[str, Path]) -> dict[str, Any]:
    """LoRA schedules and LoRAs of areas, on a MODEL with a LoRA and without; then a run without them."""
    results = {}
    for kind, dtype, name, areas in (
        ("stage_c", "fp32", "ours", False), ("stage_c", "fp32", "none", True), ("stage_b", "fp32", "core's LoRA", True),
        ("stage_c", "bf16", "ours", False), ("stage_c", "fp8", "core's LoRA", True),
        ("stage_b", "int8", "none", False),
    ):  # fmt: skip
        run = partial(run_hooked, kind, areas)
        with reference(kind, files[kind], dtype) as model:
            plain = sample(kind, model)
            # Without the engine: ComfyUI writes into weights without a trace that it could follow.
            right = run(CHANGES[name](model), engine=False)
        with placed(kind, files[kind], dtype) as (model, _, leave):
            before = sample(kind, model)
            patched = CHANGES[name](model)
            found = []
            for share in FEW:
                leave(share)
                found.append(run(patched))
            results[f"{kind}, {dtype}, {name}, {'areas' if areas else 'schedules'}"] = {
                **compared(found, right), "effect": relative(right, plain),
                "afterwards as before": same(sample(kind, model), before),
            }  # fmt: skip
    return results


def run_hooked(kind: str, areas: bool, model: Any, **changed: Any) -> Tensor:
    return sample(kind, model, prompts=hooked(kind, model, areas), steps=3, **changed)


def merged(files: dict[str, Path]) -> dict[str, Any]:
    """ModelMergeSimple of two networks, the second with a LoRA, and of a MODEL with its own clone; while either is on
    the card."""
    kind = "stage_c"
    merge = nodes_model_merging.ModelMergeSimple().merge
    with reference(kind, files[kind]) as first:
        second = by_core(core(kind, files["other"]))
        right = sample(kind, only(merge(first, second, 0.3)))
        right_own = sample(kind, only(merge(first, by_core(first), 0.3)))
    found, found_own = [], []
    with placed(kind, files[kind]) as (first, card, leave):
        second = by_core(ours(kind, files["other"], card))
        weights = Weights(second.model)
        for share in FEW:
            leave(2 * share)
            sample(kind, second)
            found.append(sample(kind, only(merge(first, second, 0.3))))
            lora = by_core(first)
            sample(kind, lora)
            found_own.append(sample(kind, only(merge(first, lora, 0.3))))
        second.detach()
        changed = weights.changed()
    return {
        "of two": compared(found, right),
        "with its own clone": compared(found_own, right_own),
        "second network": {"changed": changed},
    }


def saved_tensors(model: Any, file: Path) -> dict[str, Tensor]:
    comfy.sd.save_checkpoint(str(file), model)
    return checkpoints.read_safetensors(file)[0]


def saving(files: dict[str, Path]) -> dict[str, Any]:
    """Checkpoints saved of a patched MODEL, and a LoRA extracted of it, at each share; then a run."""
    results: dict[str, Any] = {}
    for kind, dtype, name in (
        ("stage_c", "fp32", "ours"), ("stage_c", "bf16", "core's LoRA"), ("stage_b", "fp32", "core's LoRA"),
        ("stage_c", "fp8", "ours"), ("stage_b", "int8", "core's LoRA"),
    ):  # fmt: skip
        folder = files[kind].parent
        with reference(kind, files[kind], dtype) as model:
            patched = CHANGES[name](model)
            right, right_lora = (
                saved_tensors(patched, folder / "right.safetensors"),
                extracted(patched, model),
            )
        with placed(kind, files[kind], dtype) as (model, _, leave):
            patched = CHANGES[name](model)
            first = sample(kind, patched)
            wrong, wrong_lora, wrong_runs = {}, {}, []
            for share in FEW:
                leave(share)
                saved = saved_tensors(patched, folder / "saved.safetensors")
                lora = extracted(patched, model)
                wrong[share] = different(saved, right)
                wrong_lora[share] = different(lora, right_lora)
                leave(share)
                if not same(sample(kind, patched), first):
                    wrong_runs.append(share)
        results[f"{kind}, {dtype}, {name}"] = {
            "checkpoint": {share: names[:3] for share, names in wrong.items() if names},
            "LoRA": {share: names[:3] for share, names in wrong_lora.items() if names},
            "later runs": wrong_runs,
            "tensors": len(right), "LoRA's tensors": len(right_lora),
        }  # fmt: skip
    return results


def extracted(patched: Any, model: Any) -> dict[str, Tensor]:
    """The LoRA that LoraSave extracts from ModelSubtract's result."""
    difference = only(nodes_model_merging.ModelSubtract().merge(patched, model, 1.0))
    kind = nodes_lora_extract.LORAType.FULL_DIFF
    return nodes_lora_extract.calc_lora_model(difference, 2, MODEL, MODEL, {}, kind, bias_diff=True)


def different(found: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return sorted(found.keys() ^ right.keys()) or [
        name for name in right if not same(found[name], right[name])
    ]


SCENARIOS = {
    "latents": latents,
    "in turn": in_turn,
    "hooks": hooks,
    "merged": merged,
    "saving": saving,
}


def measure() -> dict[str, Any]:
    return scenarios(SCENARIOS)
