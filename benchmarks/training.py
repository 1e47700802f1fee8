"""Speed and memory of training Stage C, with random weights of the published size and synthetic latents.

Trains a LoRA of all linear layers and a ControlNet in the loop of `cascade train`; latents and text states, which are
cached there, are random here. --published (a checkout of Stability AI's StableCascade) measures the same with its own
network, LoRA and loop: float32 weights under autocast, without the encoders that it runs in every step.

    python benchmarks/training.py [--tasks lora controlnet finetune] [--latent 24] [--batch 4] [--published PATH]
    torchrun --nproc-per-node 2 benchmarks/training.py [--fsdp] …
    python benchmarks/training.py --tasks lora --base int8 nf4 --batch 1   # frozen weights in 8 bits, and in 4
    python benchmarks/training.py --tasks stage_b text_encoder           # LoRAs of Stage B and of the text encoder
    python benchmarks/training.py --presets [8gb 12gb …]                 # each within the memory of its card

`benchmarks/ranks.py` compares one GPU with two.

A latent of 24 × 24 is a picture of 768 pixels as the published training counts them, 1024 as generated.
"""

import argparse
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.diffusion.forward_process import diffuse, random_t
from cascade_nodes.cascade_core.geometry import (
    COMPRESSOR_STRIDE,
    LATENT_CHANNELS,
    STAGE_C_COMPRESSION,
    stage_b_size,
    stage_c_size,
)
from cascade_nodes.cascade_core.networks.config import PRESETS
from cascade_nodes.cascade_core.networks.controlnet import ControlNet
from cascade_nodes.cascade_core.networks.quantisation import (
    INT8,
    QuantisedWeight,
    quantisable,
    quantise_network,
)
from cascade_nodes.cascade_core.networks.stage_b import StageB
from cascade_nodes.cascade_core.text.encoder import TextEncoder, TextStates, build_text_model
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer
from cascade_nodes.cascade_core.training import sharding
from cascade_nodes.cascade_core.training.data.batches import Batch
from cascade_nodes.cascade_core.training.frozen import quantise_layer_to_nf4
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.loop import Loop, TrainingProgress
from cascade_nodes.cascade_core.training.presets import CONTEXT_BYTES, NAMES
from cascade_nodes.cascade_core.training.presets import PRESETS as PRESETS_BY_TASK
from cascade_nodes.cascade_core.training.run import compute_dtype, prepare_blocks
from cascade_nodes.cascade_core.training.settings import Settings, StageBSettings
from cascade_nodes.cascade_core.training.settings import settings_of as read_values
from cascade_nodes.cascade_core.training.tasks.conditions import CachedText
from cascade_nodes.cascade_core.training.tasks.controlnet import ControlNetTask, published_blocks
from cascade_nodes.cascade_core.training.tasks.finetune import FinetuneTask
from cascade_nodes.cascade_core.training.tasks.lora import LoRATask
from cascade_nodes.cascade_core.training.tasks.stage_c import StageCTask
from cascade_nodes.cascade_core.writing import output_file, write_file
from machine import describe_machine, print_table
from memory import BIG_G, TOY_TEXT

# Networks by task: those that a LoRA is trained for, and those that are trained as a whole.
LORAS: dict[str, Any] = {"lora": "stage_c", "stage_b": "stage_b", "text_encoder": "text_encoder"}
WHOLE: dict[str, Any] = {"finetune": "stage_c", "finetune_b": "stage_b"}
CAPTIONS = [f"caption {number}" for number in range(64)]
# fmt: off
TINY = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]],
        "c_clip_text": 64, "c_clip_text_pooled": 64}  # to try the script
TINY_B = {"c_cond": 32, "c_hidden": [16, 32], "nhead": [-1, 2], "blocks": [[1, 1], [1, 1]],
          "block_repeat": [[1, 1], [1, 1]], "level_config": ["CT", "CTA"], "dropout": [0, 0.1],
          "self_attn": [True, True], "c_clip": 64, "c_r": 16}
TINY_CONTROLNET = {"stem": 8, "c_last": 16, "stages": [["fused", 1, 2, 8, 1], ["fused", 4, 2, 8, 1],
                                                      ["mbconv", 4, 2, 16, 1], ["mbconv", 4, 2, 16, 1]]}
# fmt: on
SPREAD = 0.02  # of random weights
WINDOW = 5  # steps between two readings of the clock
PROFILED, TAKEN = WINDOW, 2  # steps after the measured ones with --profile, and how many of them it looks at


class RandomText:
    """Text cache of random states for any caption."""

    def __init__(self, config: Any):
        pooled = getattr(config, "c_clip_text_pooled", None) or config.c_clip
        self.states_shape, self.pooled_shape = (77, getattr(config, "c_clip_text", pooled)), (pooled,)

    def fill(self, captions: Sequence[str]) -> None:
        """Encodes nothing: the states are random."""

    def states(self, captions: Sequence[str]) -> TextStates:
        count = len(captions)
        return TextStates(torch.randn(count, *self.states_shape), torch.randn(count, *self.pooled_shape))


class RandomBatches:
    """Random latents of side × side positions, and pictures if a hint needs them."""

    def __init__(self, side: int, with_images: bool):
        self.side, self.with_images = side, with_images

    def batch(self, step: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(step * ranks + rank)
        ids = torch.randint(len(CAPTIONS), (batch_size,), generator=generator)
        latents = torch.randn(
            batch_size, LATENT_CHANNELS["stage_c"], self.side, self.side, generator=generator
        )
        size = (batch_size, 3, COMPRESSOR_STRIDE * self.side, COMPRESSOR_STRIDE * self.side)
        images = torch.rand(size, generator=generator) if self.with_images else None
        keys = [b""] * batch_size
        return Batch([""] * batch_size, [CAPTIONS[i] for i in ids], latents, images, ids, cache_keys=keys)


def random_stage_c(size: str, dtype: torch.dtype, device: torch.device) -> StageC:
    config = TINY if size == "tiny" else PRESETS[f"stage_c_{size}"][1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = StageC.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def frozen_network(
    kind: Any, config: dict[str, Any], base: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """A network with its large weights in `base`, whose random values are drawn on the device, layer by layer."""
    with torch.device("meta"):
        network = kind.from_config(config).to(dtype).eval().requires_grad_(False)
    layers = list(quantisable(network))
    if base == "int8":
        stored = {
            f"{name}.weight": random_int8(layer.weight.flatten(1).shape, device) for name, layer in layers
        }
        quantise_network(network, INT8, stored)
    elif base == "nf4":
        for _, layer in layers:
            materialise(layer, device)
            if isinstance(layer, nn.Linear):
                quantise_layer_to_nf4(layer, device)
    for module in network.modules():
        materialise(module, device)
    return network.to(memory_format=torch.channels_last)


def random_int8(shape: torch.Size, device: torch.device) -> QuantisedWeight:
    weight8 = torch.randint(-64, 64, shape, dtype=torch.int8, device=device)
    return QuantisedWeight(weight8, torch.full(shape[:1], SPREAD / 64, device=device))


def materialise(module: nn.Module, device: torch.device) -> None:
    """Gives a module's own parameters random values where they have none."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values.uniform_(-SPREAD, SPREAD)
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def network_of(
    options: argparse.Namespace, name: str, base: str, dtype: torch.dtype, device: torch.device
) -> Any:
    if name == "finetune" and dtype == torch.float32:
        return random_stage_c(options.size, dtype, device)
    if name in ("stage_b", "finetune_b"):
        size = "stage_b_700m" if options.size == "1b" else "stage_b_1.5b"
        config = TINY_B if options.size == "tiny" else PRESETS[size][1]
        return frozen_network(StageB, config, base, dtype, device)
    config = TINY if options.size == "tiny" else PRESETS[f"stage_c_{options.size}"][1]
    return frozen_network(StageC, config, base, dtype, device)


def random_text_encoder(stage_c: StageC, device: torch.device) -> TextEncoder:
    """CLIP's text encoder for a Stage C, in float32 as it is trained, with the bundled vocabulary."""
    config = TOY_TEXT if stage_c.config.c_clip_text == TOY_TEXT["hidden_size"] else BIG_G
    with device:
        model = build_text_model(config, device).eval().requires_grad_(False)
    return TextEncoder(model, Tokenizer.bundled())


class RandomStageB:
    """Random training data for Stage B: Stage A's latents and the compressor's."""

    settings = StageBSettings()

    def __init__(self, side: int):
        self.pixels = int(side * STAGE_C_COMPRESSION) // 8 * 8
        self.side = side

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        positions = stage_b_size(self.pixels, self.pixels)
        shapes = (LATENT_CHANNELS["stage_b"], *positions), (LATENT_CHANNELS["stage_c"], self.side, self.side)
        latents, effnet = (torch.randn(len(batch.keys), *shape, generator=generator) for shape in shapes)
        return latents, effnet


def settings_of(
    options: argparse.Namespace, task: str, base: str, preset: str | None, folder: str
) -> Settings:
    """The settings of one measurement; those of a preset are as `cascade train` has them."""
    train: dict[str, Any] = {
        "steps": options.warm + options.steps + (PROFILED if options.profile else 0),
        "precision": options.precision,
        "compile": options.compile,
        "cuda_graphs": options.cuda_graphs,
        "deterministic": options.deterministic,
        "fsdp": options.fsdp and task in WHOLE,
        "warmup": 0,
    }
    if preset is None:
        train |= {
            "batch_size": options.batch,
            "accumulate": options.accumulate,
            "optimizer": options.optimizer,
            "gradient_checkpointing": options.recompute,
            "base_weights": base,
        }
    values: dict[str, Any] = {
        "data": {"folder": folder},
        "output": {"file": "out.safetensors", "folder": folder, "log_every": WINDOW, "checkpoint_every": 10**8},
        "train": train,
        "preset": preset,
    }  # fmt: skip
    kind: Any = "lora" if task in LORAS else "finetune" if task in WHOLE else task
    if task in LORAS:
        values["lora"] = {"network": LORAS[task], "rank": options.rank}
    elif task in WHOLE:
        values["finetune"] = {"network": WHOLE[task]}
    else:
        values["controlnet"] = {
            "start": "random",
            "config": TINY_CONTROLNET if options.size == "tiny" else {},
        }
    return read_values(values, kind, task)


def measure(
    options: argparse.Namespace, name: str, base: str = "full", preset: str | None = None
) -> dict[str, Any]:
    """Steps per second and peak memory of one task by our loop, its frozen weights in `base` or by a preset."""
    accelerator = build_accelerator()
    device = accelerator.device
    reset(device)
    began_building = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(options, name, base, preset, folder)
        side = options.latent if preset is None else stage_c_size(settings.data.size, settings.data.size)[0]
        dtype = compute_dtype(options.precision, device)
        whole = name in WHOLE and settings.finetune.depth == (0.0, 1.0)
        torch.manual_seed(0)
        stored = torch.float32 if whole else dtype
        stage_c = network_of(options, name, settings.train.base_weights, stored, device)
        text = CachedText(cast(Any, RandomText(stage_c.config)), CAPTIONS, device)
        task: StageCTask
        data = cast(Any, RandomStageB(side)) if name in ("stage_b", "finetune_b") else None
        if name in LORAS:
            encoder = random_text_encoder(stage_c, device) if name == "text_encoder" else None
            more = 0, encoder, CAPTIONS, (), data
            task = LoRATask(stage_c, text, settings.lora, settings.objective, dtype, *more)
        elif name in WHOLE:
            task = FinetuneTask(stage_c, text, settings.finetune, settings.objective, dtype, data)
        else:
            task = ControlNetTask(stage_c, text, settings.controlnet, settings.objective, dtype)
        synchronise(device)
        built = time.perf_counter() - began_building
        reset(device)  # excludes the peak of building
        prepare_blocks(
            task, replace(settings.train, fsdp=settings.train.fsdp and not options.checkpoint_blocks)
        )
        if settings.train.fsdp and accelerator.num_processes > 1:
            sharding.UNIT = options.unit
            task.divide(accelerator)
            assert task.shards is not None
            first = [unit[0] for unit in task.shards.units]
            for index, each in enumerate(first if options.prefetch else ()):
                each.set_modules_to_forward_prefetch(first[index + 1 : index + 1 + options.prefetch])
        marks: list[tuple[int, float]] = []
        losses: list[float] = []  # equal to the bit with and without CUDA graphs

        def mark(progress: TrainingProgress) -> None:
            marks.append((progress.step, time.perf_counter()))
            losses.append(progress.loss)

        loop = Loop(task, RandomBatches(side, name == "controlnet"), settings, accelerator, mark)
        loop.save = lambda: None  # would write 57 GB for a finetune
        profile = (
            profiled(loop, (settings.train.steps - PROFILED) * settings.train.accumulate)
            if options.profile
            else {}
        )
        outcome = loop.run()
    trained, peak = loop.trained_numbers, max(accelerator.gather(outcome.peak_bytes))
    if not accelerator.is_main_process:  # only the main process gets reports of steps
        return {}
    first = next(i for i, (step, _) in enumerate(marks) if step >= options.warm)
    (step, began), (last, ended) = marks[first], marks[-2 if profile else -1]
    speed = (last - step) / (ended - began)
    return {
        "steps_per_second": speed,
        "peak_gb": peak / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0,
        "trained_parameters": trained,
        "batch": settings.train.batch_size * settings.train.accumulate,
        "latent": side,
        "seconds": {"building": built, "training": outcome.seconds},
        "losses": losses,
        **({"profile": profile} if profile else {}),
    }


def profiled(loop: Loop, after: int) -> dict[str, list[str]]:
    """Profile the main process after this many steps. Returns a dictionary that will have tables of what takes time."""
    loss, tables, taken = loop.task.loss, dict[str, list[str]](), 0
    profiler = torch.profiler.profile()

    def counted(inputs: Any) -> dict[str, Tensor]:
        nonlocal taken
        if taken == after:
            synchronise(loop.task.device)
            profiler.start()
        if taken == after + TAKEN:
            synchronise(loop.task.device)
            profiler.stop()
            averages = profiler.key_averages()
            for name in ("cpu", "cuda"):
                if name == "cpu" or loop.task.device.type == "cuda":
                    table = averages.table(f"self_{name}_time_total", 30, max_name_column_width=60)
                    tables[f"{name}, {TAKEN} steps"] = table.splitlines()
        taken += 1
        return loss(inputs)

    if loop.processes.is_main_process:
        loop.task.loss = counted
    return tables


# The published loop, from its own modules


@contextmanager
def published_modules(path: Path):
    """Imports its `stage_c` and `lora` without the imports of the others (torchvision, kornia, insightface, …)."""
    package = types.ModuleType("published")
    package.__path__ = [str(path / "modules")]
    control = types.ModuleType("published.controlnet")

    class ControlNetDeliverer:  # as in modules/controlnet.py
        def __init__(self, projections: list[Tensor | None]):
            self.projections, self.index = projections, -1

        def __call__(self) -> Tensor | None:
            self.index += 1
            return self.projections[self.index] if self.index < len(self.projections) else None

    control.ControlNetDeliverer = ControlNetDeliverer  # type: ignore[attr-defined]
    sys.modules |= {"published": package, "published.controlnet": control}
    try:
        yield importlib.import_module("published.stage_c"), importlib.import_module("published.lora")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "published"]:
            del sys.modules[name]


def measure_published(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measures forward_pass and backward_pass of train/train_c_lora.py and train_c_controlnet.py."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset(device)
    with published_modules(options.published) as (stage_c, lora):
        arguments = TINY if options.size == "tiny" else PRESETS[f"stage_c_{options.size}"][1]
        with device:
            generator: nn.Module = stage_c.StageC(**arguments).requires_grad_(False)
        for parameter in generator.parameters():  # its layers have no initialisation
            nn.init.normal_(parameter, std=0.02)
        control = None
        if name == "lora":
            lora.apply_lora(generator, rank=options.rank)
            layers = [module for module in generator.modules() if isinstance(module, lora.LoRA)]
            trained = nn.ModuleList(layers).to(device).train().requires_grad_(True)
        else:
            with torch.device("meta"):
                blocks = published_blocks(StageC.from_config(arguments))
            width = arguments.get("c_hidden", [2048])[0]
            with device:
                control = ControlNet.from_config({"c_in": 1, "c_proj": width, "proj_blocks": blocks})
            trained = control
        step = _published_step(options, generator, control, trained, device)
        for _ in range(options.warm):
            step()
        synchronise(device)
        began = time.perf_counter()
        for _ in range(options.steps):
            step()
        synchronise(device)
        seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    count = sum(parameter.numel() for parameter in trained.parameters())
    return {
        "steps_per_second": options.steps / seconds,
        "peak_gb": peak,
        "trained_parameters": count,
        "batch": options.batch,  # the published loop accumulates nothing
    }


def _published_step(
    options: argparse.Namespace, generator: nn.Module, control: nn.Module | None, trained: nn.Module, device
) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    batch, side = options.batch, options.latent
    pooled, image = (
        generator.get_submodule(n).in_features for n in ("clip_txt_pooled_mapper", "clip_img_mapper")
    )
    states = generator.get_submodule("clip_txt_mapper").in_features
    sizes = {"clip_text": (77, states), "clip_text_pooled": (1, pooled), "clip_img": (1, image)}

    def step() -> None:
        latents = torch.randn(batch, LATENT_CHANNELS["stage_c"], side, side, device=device)
        conditions: dict[str, Any] = {
            n: torch.randn(batch, *cast(Any, s), device=device) for n, s in sizes.items()
        }
        if control is not None:
            conditions["cnet"] = control(
                torch.rand(batch, 1, COMPRESSOR_STRIDE * side, COMPRESSOR_STRIDE * side, device=device)
            )
        noised = diffuse(latents, torch.randn_like(latents), random_t(batch).to(device))
        with torch.autocast(device.type, torch.bfloat16):
            predicted = generator(noised.noised, noised.noise_cond, **conditions)
            loss = F.mse_loss(predicted, noised.target, reduction="none").mean(dim=[1, 2, 3])
            loss = (loss * noised.loss_weight).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0).item()  # it logs both in every step
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        loss.item()

    return step


def measure_preset(options: argparse.Namespace, preset: str, task: str) -> dict[str, Any]:
    """One task with a preset's settings, within the memory that a card of that size leaves to PyTorch."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        bound = int(preset.removesuffix("gb")) * 2**30 - CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(min(bound / total, 1.0))
    try:
        return measured(partial(measure, options, task, preset=preset))
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a measurement. After a failure the others go on, unless other processes wait for it."""
    try:
        return measure()
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        reason = f"{type(error).__name__}: {error}"[:300]
        return {"steps_per_second": 0.0, "peak_gb": 0.0, "trained_parameters": 0, "failed": reason}


def reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=(*LORAS, "controlnet", *WHOLE),
        default=["lora", "controlnet"],
    )
    parser.add_argument(
        "--base",
        nargs="+",
        choices=("full", "int8", "nf4"),
        default=["full"],
        help="frozen weights, one by one",
    )
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument(
        "--presets", nargs="*", choices=NAMES, help="measure these, or all, by the memory of a card"
    )
    parser.add_argument("--size", choices=("3.6b", "1b", "tiny"), default="3.6b")
    parser.add_argument("--latent", type=int, default=24, help="positions a side")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit", "paged_adamw8bit"), default="adamw")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="default: as `cascade train`"
    )
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--fsdp", action="store_true", help="divide what a finetune trains among the processes"
    )
    parser.add_argument(
        "--unit", type=int, default=sharding.UNIT, help="of --fsdp: weights that are gathered at a time"
    )
    parser.add_argument(
        "--prefetch", type=int, default=0, help="of --fsdp: units gathered in advance by name"
    )
    parser.add_argument(
        "--checkpoint-blocks", action="store_true", help="of --fsdp: each block by itself, not segments"
    )
    parser.add_argument(
        "--profile", action="store_true", help="tables of what takes time, of the main process"
    )
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--published", type=Path, help="a checkout of Stability-AI/StableCascade to compare with"
    )
    parser.add_argument(
        "--json", type=output_file, help="also write the numbers here, beside those that are there"
    )
    parser.add_argument("--after", type=Path, help="wait for this file before anything is built")
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    while options.after is not None and not options.after.exists():
        time.sleep(0.05)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    results: dict[str, dict[str, Any]] = {}
    measurements: dict[str, Callable[[], dict[str, Any]]] = {}
    names = [] if options.presets is None else options.presets or list(NAMES)
    for preset in names:
        refused = {"finetune"} if (preset, options.size) == ("8gb", "3.6b") else set()  # does not fit
        for task in (each for each in options.tasks if each in PRESETS_BY_TASK.keys() - refused):
            measurements[f"{task}, {preset}"] = partial(measure_preset, options, preset, task)
    for task in options.tasks if not names else ():
        for base in options.base if task not in WHOLE else ["full"]:
            name = task if base == "full" else f"{task}, {base}"
            measurements[name] = partial(measure, options, task, base)
        if options.published is not None:
            measurements[f"{task}, published"] = partial(measure_published, options, task)
    for name, measurement in measurements.items():
        result = measured(measurement)
        if result:
            results[name] = {"batch": options.batch * options.accumulate, "latent": options.latent, **result}
            print(name, results[name], flush=True)  # before the next one, which may take long
            if options.json is not None:
                write_results(options, results)
    accelerator = build_accelerator()
    if not accelerator.is_main_process:
        return
    together = accelerator.num_processes
    print(f"{describe_machine()}, {together} × {device_name()}")
    print(f"Stage C {options.size}; a step's pictures on all together, latents of so many positions a side\n")
    rows = [
        [
            name,
            f"{r['trained_parameters'] / 1e6:.1f} M",
            f"{r['batch'] * together}",
            f"{r['latent']}",
            f"{r['steps_per_second']:.3g}",
            f"{r['steps_per_second'] * r['batch'] * together:.3g}",
            f"{r['peak_gb']:.1f}",
            f"{r.get('reserved_gb', 0.0):.1f}",
        ]
        for name, r in results.items()
    ]
    print_table(
        ["task", "trained", "pictures", "latent", "steps/s", "pictures/s", "peak GB", "reserved GB"], rows
    )
    if any("failed" in result for result in results.values()):
        sys.exit(1)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"


def write_results(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Writes the results so far beside those of other runs that the file holds."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    file = options.json
    before = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else {}
    record = {
        "machine": describe_machine(),
        "device": device_name(),
        "options": values,
        "results": before | results,
    }
    write_file(file, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
