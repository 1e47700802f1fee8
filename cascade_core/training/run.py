"""A whole training run: networks and data loaded, latents and text states cached, a task trained, its file written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
from .data.access import Access
from .data.batches import Found, TrainingData, fill_cache
from .data.cache import fingerprint
from .data.hints import FindFaces
from .data.image_prompts import ImagePrompts
from .data.pictures import TrainingPicture
from .data.sources import LEFT_OUT, find_pictures, write_left_out
from .data.text_cache import TextCache
from .gradient_checkpointing import LARGE_NETWORK, checkpoint_blocks, compile_blocks
from .identity import contents_of, differences, refusal, same_file, saved, unknown_parts
from .log import duration
from .loop import Loop, Outcome, TrainingProgress, build_accelerator
from .samples import Samples
from .settings import Settings, TrainSettings
from .state import STATE, read_state, step_of
from .tasks.conditions import CachedText
from .tasks.controlnet import ControlNetTask
from .tasks.finetune import FinetuneTask
from .tasks.lora import LoRATask
from .tasks.stage_c import StageCTask
from .tasks.textual_inversion import TokensTask

if TYPE_CHECKING:
    from accelerate import Accelerator

LOCK = ".lock"  # in a run's folder
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
    check: Callable[[Path], None] | None = None,
) -> Outcome:
    """Train by resolved settings and write `output.file`; resume from the run's checkpoint unless `fresh`.

    keep_existing: a file of that name is not replaced, and the new one gets a number instead.
    notify: called with sentences for people; report: with the progress; caching: with how many latents are encoded and
    how many there are to encode; stop: asked at each file and after each step; find_faces: for the identity hint;
    check: raises CascadeError for a path of training data, its links followed, that may not be read.
    """
    accelerator = build_accelerator(settings.train.accumulate)
    if not accelerator.is_main_process:
        notify, report, caching = (lambda sentence: None), (lambda progress: None), None
    try:
        with ExitStack() as held:
            folder = Path(settings.output.folder or "")
            on_main_process(accelerator, lambda: held.enter_context(locked(folder, notify)))
            pictures = find_pictures(settings.data.folder, settings.data.tars, Access(stop, check))
            begun = on_main_process(
                accelerator,
                lambda: _begun(settings, pictures[0], accelerator.num_processes, notify, stop, fresh),
            )
            if begun.file is not None and not keep_existing:
                notify(
                    f"The run is finished, at step {settings.train.steps}, and its result is {begun.file}. Give more "
                    "train.steps to go on, or --fresh to begin anew."
                )
                return Outcome(settings.train.steps, True, seconds=0.0, peak_bytes=0, file=begun.file)
            loop = prepare(settings, accelerator, notify, report, caching, stop, find_faces, pictures)
            loop.contents = begun.contents
            outcome = _run(loop, settings, accelerator, notify, fresh, keep_existing)
    except Interrupted:
        outcome = Outcome(step=0, finished=False, seconds=0.0, peak_bytes=0)
    if not outcome.finished:
        notify("Stopped; the same command goes on from here.")
    return outcome


class _Begun(NamedTuple):
    """How far a run folder's run is. contents: of `identity`; file: its result, where it is at its end."""

    contents: dict[str, str]
    file: Path | None = None


def _begun(
    settings: Settings,
    pictures: Sequence[TrainingPicture],
    processes: int,
    notify: Notify,
    stop: Callable[[], bool],
    fresh: bool,
) -> _Begun:
    """Compare the run folder's state with the settings, before anything is loaded or encoded.

    Raises CascadeError where another result would come of it than the state was trained for.
    """

    def asked() -> None:
        if stop():
            raise Interrupted("The run was stopped before it began.")

    contents = contents_of(settings, pictures, cache_of(settings), processes, asked)
    path = Path(settings.output.folder or "") / STATE
    if fresh or not path.exists():
        return _Begun(contents)
    _, metadata = read_state(path)
    if differing := differences(settings, contents, metadata):
        raise refusal(path, differing)
    if unknown := unknown_parts(metadata):
        notify(
            f"{path} is of an earlier version and does not tell its {' and '.join(unknown)}; they are taken as given."
        )
    step, steps, before = step_of(metadata, path), settings.train.steps, saved(metadata)
    if step > steps:
        raise CascadeError(
            f"{path} is at step {step}, but train.steps is {steps}, and a run does not go back; give at least {step}, "
            "or begin anew with --fresh."
        )
    if before is not None and before.train.steps != steps:
        cosine = settings.train.schedule == "cosine" and step > settings.train.warmup
        shape = (
            f"; from here on the learning rate follows the cosine of {steps} steps, so the result is not that of a run "
            f"of {steps} steps from its beginning"
        )
        notify(f"train.steps was {before.train.steps} and is {steps} now{shape * cosine}.")
    file = Path(settings.output.file)
    written = file.is_file() and file.stat().st_mtime_ns >= path.stat().st_mtime_ns
    finished = step == steps and written and same_file(settings, metadata)
    return _Begun(contents, file if finished else None)


T = TypeVar("T")


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something in the main process alone; its result, or what it raises, is every process's."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except (CascadeError, Interrupted) as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@contextmanager
def locked(folder: Path, notify: Notify) -> Iterator[None]:
    """Hold a run's folder alone inside the block. The system ends the lock with the process; its file may stay."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CascadeError(
            f"Another training runs in {folder}; wait for its end, or give this one an output.folder of its own."
        ) from None
    except (OSError, NotImplementedError) as error:
        notify(f"{folder} cannot be locked ({error}); let no other training run in it at the same time.")
    try:
        yield
    finally:
        lock.release()


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


def cache_of(settings: Settings) -> str:
    return settings.data.cache or f"{settings.output.folder}/cache"


def prepare(
    settings: Settings,
    accelerator: Accelerator,
    notify: Notify = lambda sentence: None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    find_faces: FindFaces | None = None,
    pictures: Found | None = None,
) -> Loop[StageCTask]:
    """Everything up to the first step. Raises Interrupted where `stop` says so while latents are encoded.

    pictures: those of the data where they are listed already.
    """
    device = accelerator.device
    dtype = compute_dtype(settings.train.precision, device)
    cache = cache_of(settings)
    compressor = load_network(
        settings.models.compressor, "compressor", torch.float32, device, SemanticCompressor
    )

    def encode(pixels: Tensor) -> Tensor:
        return compressor(pixels.to(device))

    access = Access(stop)

    def report_caching(done: int, total: int) -> None:
        if caching is not None:
            caching(done, total)
        access.ask()

    data_settings, compressor_digest = replace(settings.data, cache=cache), fingerprint(compressor)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if ranks > 1:  # each encodes its share of the latents
        fill_cache(data_settings, encode, compressor_digest, rank, ranks, report_caching, pictures, access)
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
            pictures=pictures,
            access=access,
        )
        notify(data.summary())
        if accelerator.is_main_process:
            write_left_out(Path(settings.output.folder or "") / LEFT_OUT, data.skipped)
        encoder = TextEncoder.load(settings.models.text_encoder, dtype=torch.float32)
        encoder.model.to(device)
        texts = TextCache(encoder, cache)
        text_is_trained = bool(settings.tokens) or (settings.task == "lora" and settings.lora.text_encoder)
        texts.fill([] if text_is_trained else [*data.captions, *settings.output.prompts], ask=access.ask)
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
    assert models.previewer is not None  # the settings ask for it
    from ..networks.previewer import Previewer

    previewer = load_network(models.previewer, "previewer", torch.float32, device, Previewer)
    batch = data.batch(0, len(output.prompts))
    hints = {}
    if settings.task == "controlnet":
        hint = task.prepare(batch, torch.Generator().manual_seed(0)).hint
        assert hint is not None
        hints["hint"] = hint[
            torch.arange(len(output.prompts)) % len(hint)
        ]  # a bucket may have fewer pictures
    height, width = batch.latents.shape[-2:]
    return Samples(task, output, (height, width), previewer, settings.train.seed, hints)
