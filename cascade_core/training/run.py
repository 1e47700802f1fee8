"""A whole training run: loads networks and data, caches latents and text states, trains a task, writes its file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import load_model
from ..engine.graphs import can_allocate_in_capture
from ..errors import CascadeError, Interrupted, counted, excerpt, on_one_line, printable
from ..geometry import largest_size
from ..networks.compressor import SemanticCompressor
from ..networks.fp16 import scale_residual_stream
from ..networks.previewer import Previewer
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from ..text.encoder import TextEncoder
from ..vision import ImageEncoder
from .checks import check_image_prompts, check_networks, check_output
from .data.access import Access
from .data.batches import Found, TrainingData, epoch_steps, fill_cache
from .data.cache import fingerprint
from .data.held_out import FoundPictures, as_they_are, find_and_hold_out
from .data.hints import FindFaces
from .data.image_prompts import ImagePrompts
from .data.pictures import TrainingPicture
from .data.sources import LEFT_OUT, write_left_out
from .data.stage_b import HeldOutStageB, StageBData
from .data.text_cache import TextCache
from .deadline import stop_time, stopping
from .frozen import load_frozen, parameter_count
from .gradient_checkpointing import LARGE_NETWORK, checkpoint_blocks, checkpoint_segments, compile_blocks
from .launch import build_accelerator, compute_dtype
from .log import duration
from .loop import Loop, Outcome, TrainingProgress
from .processes import Processes
from .prompts import sample_prompts, texts_of, with_prompts_of_file
from .ranges import in_steps
from .results import Results
from .run_folder import Notify, begun, cache_of, compare_settings, compared, locked
from .samples import CascadeDecoder, Decoder, PreviewDecoder, Samples, StageBSamples
from .settings import DataSettings, Settings, TrainSettings
from .sharding import lay_out_as_divided
from .state import STATE
from .tasks.conditions import CachedText
from .tasks.controlnet import ControlNetTask
from .tasks.finetune import FinetuneTask, cast_parameters, select_parameters
from .tasks.lora import LoRATask
from .tasks.stage_c import StageCTask
from .tasks.textual_inversion import TokensTask
from .telling import at_beginning, at_end
from .validation import Validation


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
    show: Callable[[Path], None] = lambda path: None,
) -> Outcome:
    """Trains with resolved settings and writes `output.file`; resumes from the run's checkpoint unless `fresh`.

    keep_existing: an existing file is not replaced; the new one gets a number.
    notify: called with sentences for the user; report: with the progress; caching: with the number of latents encoded
    so far and in total; stop: called at each file and after each step; find_faces: for the identity hint; check:
    raises CascadeError for a path of training data, with links resolved, that may not be read; show:
    called with the file of each curve and each sample as it is written.
    """
    processes = build_accelerator(settings.train.precision)
    if not processes.is_main_process:
        notify, report, caching = (lambda sentence: None), (lambda progress: None), None

    def read_prompts() -> Settings:
        given = replace(settings, output=with_prompts_of_file(settings.output))
        check_output(given, keep_existing)
        return given

    end = processes.on_each(lambda: stop_time(settings.train, datetime.now()))
    ended = stopping(lambda: False, end)
    stop = stopping(stop, end)
    try:
        with ExitStack() as held:
            held.enter_context(processes.naming_the_lost())
            settings = processes.on_each(read_prompts)
            compare_settings(settings, processes)
            folder = Path(settings.output.folder or "")
            processes.on_main(lambda: held.enter_context(locked(folder, notify)))
            access = Access(stop, check)
            pictures = processes.on_each(
                lambda: find_and_hold_out(settings.data, settings.validation, access)
            )
            trained = pictures.trained
            settings = with_steps(settings, trained, processes, access)
            contents = compared(settings, pictures, processes, access.ask)

            def standing() -> str | None:
                file = begun(settings, contents, notify, fresh)
                return None if file is None else str(file)

            if (file := processes.on_main(standing)) is not None and not keep_existing:
                notify(
                    f"The run is finished, at step {settings.train.steps}, and its result is {file}. Give more "
                    "train.steps to go on, or --fresh to begin anew."
                )
                return Outcome(settings.train.steps, True, seconds=0.0, peak_bytes=0, file=Path(file))
            processes.on_main(lambda: check_networks(settings, [*trained, *pictures.held_out], find_faces))
            loop = prepare(settings, processes, notify, report, caching, stop, find_faces, pictures)
            loop.contents, loop.show = contents, show
            results = Results(settings, trained, keep_existing)

            def keep() -> None:
                write_together(loop, results.save)

            loop.keep = keep
            outcome = _run(loop, results, notify, fresh)
    except Interrupted:
        outcome = Outcome(step=0, finished=False, seconds=0.0, peak_bytes=0)
    except BrokenPipeError:  # of whoever reads what is printed
        raise
    except OSError as error:  # of the log, the curve or a sample; what is worth most has sentences of its own
        reason = error.strerror or excerpt(on_one_line(error), 240)
        file = printable(str(error.filename or "a file"))
        raise CascadeError(
            f"The run in {settings.output.folder} could not use {file} ({reason}); free some space there or put the "
            "folder back, and the same command goes on from the last checkpoint."
        ) from error
    if not outcome.finished:
        at = f" at {end:%Y-%m-%d %H:%M}, as train.stop_at or stop_after says" if ended() else ""
        notify(f"Stopped{at}; the same command goes on from here.")
    return outcome


def with_steps(
    settings: Settings, pictures: list[TrainingPicture], processes: Processes, access: Access
) -> Settings:
    """The settings with epochs converted to steps."""
    train, output, validation = settings.train, settings.output, settings.validation
    every = {name: getattr(output, name) for name in ("checkpoint_every", "sample_every", "save_every")}
    if train.epochs is None and not any(
        isinstance(each, str) for each in (*every.values(), validation.every)
    ):
        return settings
    data = replace(settings.data, cache=cache_of(settings))
    rows, with_prompts = train.batch_size * processes.num_processes, settings.models.image_encoder is not None
    batches = processes.on_main(lambda: epoch_steps(data, pictures, rows, access, with_prompts))
    epoch = batches / train.accumulate
    steps = train.steps if train.epochs is None else max(round(train.epochs * epoch), 1)
    return replace(
        settings,
        train=replace(train, steps=steps),
        output=replace(output, **{name: in_steps(each, epoch) for name, each in every.items()}),
        validation=replace(validation, every=in_steps(validation.every, epoch)),
    )


def write_together(loop: Loop[StageCTask], write: Callable[[Loop[StageCTask]], object]) -> object:
    """Writes files in the main process. For a network divided among processes, all take part to gather its rows."""
    if loop.task.shards is not None:
        return write(loop)
    return loop.processes.on_main(lambda: str(write(loop)))


def _run(loop: Loop[StageCTask], results: Results, notify: Notify, fresh: bool) -> Outcome:
    if fresh:
        (loop.folder / STATE).unlink(missing_ok=True)
        loop.processes.wait()
    if loop.resume():
        notify(f"Going on from step {loop.step} of {loop.folder / STATE}.")
    outcome = loop.run()
    peak = outcome.peak_bytes / 1e9
    memory = f", at most {peak:.1f} GB of the accelerator" if peak else ""
    notify(f"{counted(outcome.step, 'step')}, {duration(outcome.seconds)} this time{memory}.")
    if not outcome.finished:
        return outcome
    path = Path(str(write_together(loop, results.write)))
    if loop.processes.is_main_process:
        notify(at_end(loop, path))
    return replace(outcome, file=path)


def prepare(
    settings: Settings,
    processes: Processes,
    notify: Notify = lambda sentence: None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    caching: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    find_faces: FindFaces | None = None,
    pictures: FoundPictures | None = None,
) -> Loop[StageCTask]:
    """Prepares a run up to its first step. Raises Interrupted where `stop` is True while latents are encoded.

    pictures: those of the data, if they are listed already.
    """
    device = processes.device
    dtype = compute_dtype(settings.train.precision, device)
    validation, file = settings.validation, settings.models.compressor
    compressor = processes.on_each(
        lambda: load_network(file, "compressor", torch.float32, device, SemanticCompressor)
    )

    access = Access(stop)
    pictures = pictures or find_and_hold_out(settings.data, validation, access)

    def report_caching(done: int, total: int) -> None:
        if caching is not None:
            caching(done, total)
        access.ask()

    data, held_out, image_prompts = _data_of(
        settings, pictures, compressor, processes, report_caching, access
    )
    notify(data.summary())
    if held_out is not None:
        count = len(pictures.held_out)
        notify(
            f"{counted(count, 'picture')} {'is' if count == 1 else 'are'} held out; the error is measured on "
            f"{len(held_out):,}."
        )
    if processes.is_main_process:
        write_left_out(Path(settings.output.folder or "") / LEFT_OUT, data.skipped)
    more_texts = held_out.captions if held_out is not None else []
    text, trained_encoder = _text_of(settings, data.captions, more_texts, processes, access)

    stage_b, held_out_b, stage_a = stage_b_data(
        settings, data, held_out, compressor, processes, report_caching, access
    )

    def load_task() -> StageCTask:
        network = load_trained_for(settings, dtype, device, image_prompts)
        captions = data.captions
        return build_task(
            settings, network, text, dtype, compressor, trained_encoder, captions, find_faces, stage_b
        )

    task = processes.on_each(load_task)
    prepare_blocks(task, settings.train)
    if settings.train.fsdp:
        if processes.num_processes > 1:
            task.divide(processes)
        else:
            lay_out_as_divided(task.network)
    # All processes run a divided network together, so none may stop by itself.
    asked = stop if task.shards is None else lambda: False
    samples = processes.on_each(lambda: _samples(settings, task, data, dtype, asked, stage_a))
    loop = Loop(task, data, settings, processes, report, stop, samples)
    if held_out is not None and isinstance(validation.every, int):
        measure = Validation(task, held_out, validation, settings.train.batch_size, held_out_b)
        loop.validate = validation.every, measure
    steps = data.steps_per_epoch(settings.train.batch_size, processes.num_processes)
    notify(at_beginning(loop, steps, data.rows_per_epoch, settings.output.file, settings.preset))
    return loop


def _data_of(
    settings: Settings,
    pictures: FoundPictures,
    compressor: SemanticCompressor,
    processes: Processes,
    report: Callable[[int, int], None],
    access: Access,
) -> tuple[TrainingData, TrainingData | None, ImagePrompts | None]:
    """The training data, the held-out pictures that are measured on, and the image prompts."""
    device, cache, validation = processes.device, cache_of(settings), settings.validation
    data_settings, compressor_digest = replace(settings.data, cache=cache), fingerprint(compressor)
    found = pictures.trained, pictures.skipped
    measured = pictures.held_out[: validation.pictures]

    def encode(pixels: Tensor) -> Tensor:
        return compressor(pixels.to(device))

    image_prompts = processes.on_each(lambda: image_prompts_of(settings, cache, device))
    if processes.num_processes > 1:  # each encodes its share
        parts = processes, report, image_prompts, found, access
        fill_cache(data_settings, encode, compressor_digest, *parts)
        parts = processes, report, None, (measured, []), access
        fill_cache(as_they_are(data_settings), encode, compressor_digest, *parts)

    def open_data(
        settings_of_data: DataSettings, found: Found, seed: int, prompts: ImagePrompts | None
    ) -> TrainingData:
        with_images = settings.task == "controlnet"
        more = with_images, report, prompts, found, access
        return TrainingData(settings_of_data, encode, compressor_digest, seed, *more)

    seed = settings.train.seed
    data = processes.on_each(lambda: open_data(data_settings, found, seed, image_prompts))
    processes.compare({"what can be trained on": data.summary()})

    def open_held_out() -> TrainingData | None:
        return open_data(as_they_are(data_settings), (measured, []), 0, None) if measured else None

    return data, processes.on_each(open_held_out), image_prompts


def _text_of(
    settings: Settings,
    captions: list[str],
    more_texts: list[str],
    processes: Processes,
    access: Access,
) -> tuple[CachedText, TextEncoder | None]:
    """The captions' cached states, and the text encoder if it or its tokens are trained; otherwise it is released.

    more_texts: encoded as well.
    """
    device, cache = processes.device, cache_of(settings)

    def load() -> tuple[TextEncoder, TextCache]:
        encoder = TextEncoder.load(settings.models.text_encoder, dtype=torch.float32)
        encoder.model.to(device)
        return encoder, TextCache(encoder, cache)

    encoder, texts = processes.on_each(load)
    if settings.text_is_trained:
        text, trained = CachedText(texts, [""], device), encoder
    else:
        texts.fill_together([*captions, *texts_of(settings.output.prompts)], processes, access.ask)
        texts.fill_together(more_texts, processes, access.ask)
        text, trained = CachedText(texts, captions, device), None
    texts.release()
    return text, trained


def image_prompts_of(settings: Settings, cache: str, device: torch.device) -> ImagePrompts | None:
    """Image prompts by the settings' image encoder, if there is one."""
    if settings.models.image_encoder is None:
        return None
    encoder = ImageEncoder.load(settings.models.image_encoder, dtype=torch.float32)
    encoder.model.to(device)
    return ImagePrompts(encoder, cache)


def prepare_blocks(task: StageCTask, settings: TrainSettings) -> None:
    """Compiles and checkpoints the network's blocks, and uses CUDA graphs, as the settings say."""
    stage_c = task.network
    if settings.compile:
        compile_blocks(stage_c)
    checkpointing = settings.gradient_checkpointing
    if checkpointing is None:
        checkpointing = parameter_count(stage_c) > LARGE_NETWORK
    if checkpointing:
        if isinstance(task, LoRATask) and task.changes is not None:
            checkpoint_blocks(stage_c, task.changes.contexts)
        elif settings.fsdp:
            checkpoint_segments(stage_c)
        else:
            checkpoint_blocks(stage_c)
    if settings.cuda_graphs and can_allocate_in_capture(task.device):
        task.use_cuda_graphs()


def load_network(path: str, kind: str, dtype: torch.dtype | None, device: torch.device, cls):
    network, _, _ = load_model(path, expect=kind, dtype=dtype, device=device)
    assert isinstance(network, cls)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def load_trained_for(
    settings: Settings, dtype: torch.dtype, device: torch.device, image_prompts: ImagePrompts | None = None
) -> StageC | StageB:
    """The stage that is trained, or for which something is trained."""
    kind, cls = ("stage_b", StageB) if settings.network == "stage_b" else ("stage_c", StageC)
    path, base = getattr(settings.models, kind), settings.train.base_weights
    if settings.task == "finetune" and settings.network != "text_encoder":
        # On a small card only the trained part has room in float32.
        network = load_network(path, kind, None, torch.device("cpu"), cls)
        trained = select_parameters(network, settings.finetune.modules, settings.finetune.depth)
        cast_parameters(network, trained, dtype, device)
    elif base == "full":
        network = load_network(path, kind, dtype, device, cls)
    else:
        network = load_frozen(path, kind, base, dtype, device).to(memory_format=torch.channels_last)
    if isinstance(network, StageC):
        if dtype == torch.float16:
            scale_residual_stream(network)
        if image_prompts is not None:
            check_image_prompts(image_prompts.width, network)
    return network


def _stage_c(settings: Settings, dtype: torch.dtype, device: torch.device) -> StageC:
    """A Stage C for samples, in the precision that the run's network has."""
    path, base = settings.models.stage_c, settings.train.base_weights
    if base != "full":
        return load_frozen(path, "stage_c", base, dtype, device)
    stage_c = load_network(path, "stage_c", dtype, device, StageC)
    if dtype == torch.float16:
        scale_residual_stream(stage_c)
    return stage_c


def stage_b_data(
    settings: Settings,
    data: TrainingData,
    held_out: TrainingData | None,
    compressor: SemanticCompressor,
    processes: Processes,
    report: Callable[[int, int], None],
    access: Access,
) -> tuple[StageBData | None, HeldOutStageB | None, StageA | None]:
    """Stage B's data of the pictures that are trained on and of those that are held out, and its Stage A, on the CPU.

    None where Stage B is not trained.
    """
    if settings.network != "stage_b":
        return None, None, None
    device, file = processes.device, str(settings.models.stage_a)
    stage_a = processes.on_each(lambda: load_network(file, "stage_a", torch.float32, device, StageA))

    def encode(pixels: Tensor) -> Tensor:
        return stage_a.encode(pixels.to(device))

    def compress(pixels: Tensor) -> Tensor:
        return compressor(pixels.to(device))

    made = (encode, fingerprint(stage_a)), (compress, fingerprint(compressor))
    more = stage_a.config.c_latent, processes, report, access.ask
    found = StageBData(settings.stage_b, data, *made, *more)
    measured = HeldOutStageB(held_out, made[0], *more) if held_out is not None else None
    return found, measured, stage_a.to("cpu")


def build_task(
    settings: Settings,
    network: StageC | StageB,
    text: CachedText,
    dtype: torch.dtype,
    compressor: SemanticCompressor,
    encoder: TextEncoder | None,
    captions: list[str],
    find_faces: FindFaces | None,
    stage_b: StageBData | None = None,
) -> StageCTask:
    objective, seed = settings.objective, settings.train.seed
    if settings.task == "lora":
        more = encoder, captions, settings.tokens, stage_b
        return LoRATask(network, text, settings.lora, objective, dtype, seed, *more)
    if settings.task == "finetune":
        return FinetuneTask(network, text, settings.finetune, objective, dtype, stage_b, encoder, captions)
    assert isinstance(network, StageC)
    if settings.task == "controlnet":
        more = dtype, seed, compressor, find_faces
        return ControlNetTask(network, text, settings.controlnet, objective, *more)
    assert encoder is not None
    return TokensTask(network, text, settings.tokens, objective, dtype, encoder, captions)


def _samples(
    settings: Settings,
    task: StageCTask,
    data: TrainingData,
    dtype: torch.dtype,
    stop: Callable[[], bool],
    stage_a: StageA | None = None,
) -> Samples | StageBSamples | None:
    """stage_a: if Stage B is trained"""
    if not settings.output.sample_every:
        return None
    prompts, hints = sample_prompts(settings), None
    if stage_a is not None:
        # Each process holds only its shard, whose device memory the optimiser refers to.
        divided = task.shards is not None
        if not divided:
            task.network.to("cpu")  # both networks together would need more memory than training does
        samples = StageBSamples(
            task, _stage_c(settings, dtype, task.device), settings.output, prompts, stage_a, stop
        )
        if not divided:
            task.network.to(task.device)
        return samples
    if settings.task == "controlnet":
        batch = data.batch(0, len(prompts))
        hint = task.prepare(batch, torch.Generator().manual_seed(0)).hint
        assert hint is not None
        height, width = batch.latents.shape[-2:]
        # A bucket may have fewer pictures than there are prompts.
        hints = hint[torch.arange(len(prompts)) % len(hint)], (height, width)
        prompts = [replace(prompt, size=largest_size((height, width))[::-1]) for prompt in prompts]
    return Samples(task, settings.output, prompts, _decoder(settings, task.device, dtype), hints, stop)


def _decoder(settings: Settings, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder of samples: Stage B and Stage A, in main memory until they are used, or the previewer."""
    models = settings.models
    if models.stage_b is not None and models.stage_a is not None:
        cpu = torch.device("cpu")
        stage_b = load_network(models.stage_b, "stage_b", dtype, cpu, StageB)
        # Stage A's rounding in bf16 is below 8 bits; in fp16 it overflows.
        exact = torch.float32 if dtype == torch.float16 else dtype
        stage_a = load_network(models.stage_a, "stage_a", exact, cpu, StageA)
        return CascadeDecoder(stage_b, stage_a, device, dtype)
    assert models.previewer is not None  # `resolve` asks for it
    return PreviewDecoder(load_network(models.previewer, "previewer", torch.float32, device, Previewer))
