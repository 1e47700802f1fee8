"""A whole training run: networks and data loaded, latents and text states cached, a task trained, its file written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoints import load_model
from ..engine.graphs import can_capture
from ..errors import CascadeError, Interrupted
from ..file_names import numbered
from ..networks.compressor import SemanticCompressor
from ..networks.stage_c import StageC
from ..text.encoder import TextEncoder
from ..vision import ImageEncoder
from ..writing import move_to_free, temporary_file
from .data.batches import TrainingData, fill_cache
from .data.cache import fingerprint
from .data.hints import FindFaces
from .data.image_prompts import ImagePrompts
from .data.text_cache import TextCache
from .gradient_checkpointing import LARGE_NETWORK, checkpoint_blocks, compile_blocks
from .log import duration
from .loop import Loop, Outcome, TrainingProgress, build_accelerator
from .samples import Samples
from .settings import Settings, TrainSettings
from .state import STATE
from .tasks.conditions import CachedText
from .tasks.controlnet import ControlNetTask
from .tasks.finetune import FinetuneTask
from .tasks.lora import LoRATask
from .tasks.stage_c import StageCTask
from .tasks.textual_inversion import TokensTask

if TYPE_CHECKING:
    from accelerate import Accelerator

Notify = Callable[[str], None]  # takes sentences for people


def train(
    settings: Settings,
    notify: Notify = lambda sentence: None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    fresh: bool = False,
    find_faces: FindFaces | None = None,
    keep_existing: bool = False,
) -> Outcome:
    """Train by resolved settings and write `output.file`; resume from the run's checkpoint unless `fresh`.

    keep_existing: a file of that name is not replaced, and the new one gets a number instead.
    notify: called with sentences for people; report: with the progress; caching: with how many latents are encoded and
    how many there are to encode; stop: asked after each step; find_faces: for the identity hint.
    """
    accelerator = build_accelerator(settings.train.accumulate)
    if not accelerator.is_main_process:
        notify, report, caching = (lambda sentence: None), (lambda progress: None), None
    try:
        loop = prepare(settings, accelerator, notify, report, caching, stop, find_faces)
    except Interrupted:
        outcome = Outcome(step=0, finished=False, seconds=0.0, peak_bytes=0)
    else:
        outcome = _run(loop, settings, accelerator, notify, fresh, keep_existing)
    if not outcome.finished:
        notify("Stopped; the same command goes on from here.")
    return outcome


def _run(
    loop: Loop[StageCTask],
    settings: Settings,
    accelerator: Accelerator,
    notify: Notify,
    fresh: bool,
    keep_existing: bool,
) -> Outcome:
    if fresh and accelerator.is_main_process:
        (loop.folder / STATE).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if loop.resume():
        notify(f"Going on from step {loop.step} of {loop.folder / STATE}.")
    outcome = loop.run()
    peak = outcome.peak_bytes / 1e9
    memory = f", at most {peak:.1f} GB of the accelerator" if peak else ""
    notify(f"{outcome.step} steps, {duration(outcome.seconds)} this time{memory}.")
    if outcome.finished and accelerator.is_main_process:
        path = _write(loop, Path(settings.output.file), keep_existing)
        notify(f"Wrote {path}.")
        outcome = replace(outcome, file=path)
    return outcome


def _write(loop: Loop[StageCTask], path: Path, keep_existing: bool) -> Path:
    metadata = {"trained_steps": str(loop.step)}
    if not keep_existing:
        loop.task.write(loop.state, path, metadata)
        return path
    with temporary_file(path.parent) as temporary:
        loop.task.write(loop.state, temporary, metadata)
        return move_to_free(temporary, numbered(path))


def prepare(
    settings: Settings,
    accelerator: Accelerator,
    notify: Notify = lambda sentence: None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    find_faces: FindFaces | None = None,
) -> Loop[StageCTask]:
    """Everything up to the first step. Raises Interrupted where `stop` says so while latents are encoded."""
    device = accelerator.device
    dtype = compute_dtype(settings.train.precision, device)
    cache = settings.data.cache or f"{settings.output.folder}/cache"
    compressor = load_network(
        settings.models.compressor, "compressor", torch.float32, device, SemanticCompressor
    )

    def encode(pixels: Tensor) -> Tensor:
        return compressor(pixels.to(device))

    def report_caching(done: int, total: int) -> None:
        if caching is not None:
            caching(done, total)
        if stop():
            raise Interrupted("The run was stopped; the latents encoded so far are kept.")

    data_settings, compressor_digest = replace(settings.data, cache=cache), fingerprint(compressor)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if ranks > 1:  # each encodes its share of the latents
        fill_cache(data_settings, encode, compressor_digest, rank, ranks, report_caching)
        accelerator.wait_for_everyone()
    with accelerator.main_process_first():  # the others then find the text states in the cache
        image_prompts = image_prompts_of(settings, cache, device)
        data = TrainingData(
            data_settings,
            encode,
            compressor_digest,
            settings.train.seed,
            with_images=settings.task == "controlnet",
            report=report_caching,
            image_prompts=image_prompts,
        )
        notify(data.summary())
        encoder = TextEncoder.load(settings.models.text_encoder, dtype=torch.float32)
        encoder.model.to(device)
        texts = TextCache(encoder, cache)
        text_is_trained = bool(settings.tokens) or (settings.task == "lora" and settings.lora.text_encoder)
        texts.fill([] if text_is_trained else [*data.captions, *settings.output.prompts])
    text = CachedText(texts, [""] if text_is_trained else data.captions, device)
    texts.release()
    trained_encoder = encoder if text_is_trained else None
    del encoder  # frees its memory before Stage C is loaded
    stage_c = load_network(
        settings.models.stage_c,
        "stage_c",
        torch.float32 if settings.task == "finetune" else dtype,
        device,
        StageC,
    )
    if image_prompts is not None and image_prompts.width != stage_c.config.c_clip_img:
        raise CascadeError(
            f"models.image_encoder gives vectors of {image_prompts.width}, but this Stage C takes "
            f"{stage_c.config.c_clip_img}; choose the image encoder that belongs to it."
        )
    task = build_task(settings, stage_c, text, dtype, compressor, trained_encoder, data.captions, find_faces)
    prepare_blocks(task, settings.train)
    return Loop(task, data, settings, accelerator, report, stop, _samples(settings, task, data, device))


def image_prompts_of(settings: Settings, cache: str, device: torch.device) -> ImagePrompts | None:
    """Image prompts by the settings' image encoder, if there is one."""
    if settings.models.image_encoder is None:
        return None
    encoder = ImageEncoder.load(settings.models.image_encoder, dtype=torch.float32)
    encoder.model.to(device)
    return ImagePrompts(encoder, cache)


def prepare_blocks(task: StageCTask, settings: TrainSettings) -> None:
    """Compile and checkpoint Stage C's blocks, and use CUDA graphs, as the settings say."""
    stage_c = task.stage_c
    if settings.compile:
        compile_blocks(stage_c)
    checkpointing = settings.gradient_checkpointing
    if checkpointing is None:
        checkpointing = sum(parameter.numel() for parameter in stage_c.parameters()) > LARGE_NETWORK
    if checkpointing:
        checkpoint_blocks(stage_c, task.changes.current if isinstance(task, LoRATask) else nullcontext)
    if settings.cuda_graphs and can_capture(task.device):
        task.use_cuda_graphs()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def load_network(path: str, kind: str, dtype: torch.dtype, device: torch.device, cls):
    network, _, _ = load_model(path, expect=kind, dtype=dtype, device=device)
    assert isinstance(network, cls)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def build_task(
    settings: Settings,
    stage_c: StageC,
    text: CachedText,
    dtype: torch.dtype,
    compressor: SemanticCompressor,
    encoder: TextEncoder | None,
    captions: list[str],
    find_faces: FindFaces | None,
) -> StageCTask:
    objective, seed = settings.objective, settings.train.seed
    if settings.task == "lora":
        return LoRATask(
            stage_c, text, settings.lora, objective, dtype, seed, encoder, captions, settings.tokens
        )
    if settings.task == "controlnet":
        return ControlNetTask(
            stage_c, text, settings.controlnet, objective, dtype, seed, compressor, find_faces
        )
    if settings.task == "finetune":
        return FinetuneTask(stage_c, text, settings.finetune, objective, dtype)
    assert encoder is not None
    return TokensTask(stage_c, text, settings.tokens, objective, dtype, encoder, captions)


def _samples(
    settings: Settings, task: StageCTask, data: TrainingData, device: torch.device
) -> Samples | None:
    output, models = settings.output, settings.models
    if not output.sample_every:
        return None
    if not output.prompts or models.previewer is None:
        raise CascadeError(
            "output.sample_every makes pictures of output.prompts by models.previewer; give both, or leave it at 0."
        )
    from ..networks.previewer import Previewer

    previewer = load_network(models.previewer, "previewer", torch.float32, device, Previewer)
    batch = data.batch(0, len(output.prompts))
    hints = {}
    if settings.task == "controlnet":
        if len(batch.keys) < len(output.prompts):
            raise CascadeError("output.prompts has more entries than a bucket has pictures; give fewer.")
        hints["hint"] = task.prepare(batch, torch.Generator().manual_seed(0)).hint
    height, width = batch.latents.shape[-2:]
    return Samples(task, output, (height, width), previewer, settings.train.seed, hints)
