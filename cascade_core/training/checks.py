"""Checks of a run before its networks are loaded and its pictures are encoded."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import load_model
from ..checkpoints.files import check_writable
from ..errors import CascadeError, quoted
from ..networks.compressor import SemanticCompressor
from ..networks.quantisation import quantisable
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from ..text.encoder import TextEncoder
from ..vision import ImageEncoder
from .data.captions import trained_captions
from .data.hints import FindFaces
from .data.pictures import TrainingPicture
from .frozen import check_base
from .identity import input_files
from .optimisers import SOURCES, build_optimiser, optimiser_class
from .presets import free_bytes
from .settings import DECODERS, Settings, TrainSettings
from .state import STATE, load_optimiser, optimiser_tensors
from .tasks.controlnet import check_controlnet
from .tasks.finetune import select_parameters
from .tasks.lora import check_lora
from .tasks.textual_inversion import check_names, first_vectors
from .trackers import check_trackers

SUFFIX = ".safetensors"
# For each weight: an optimiser's state (others may keep less), and what is quantised.
STATE_BYTES, QUANTISED_BYTES = {"adamw": 8, "adamw8bit": 2, "lion": 4}, {"int8": 1.0, "nf4": 0.52}
ACTIVATION_BYTES = 2**30  # of a finetune of one picture at a time; 0.6 to 1.2 GB were measured


def check_output(settings: Settings, keep_existing: bool = False) -> None:
    """Raises CascadeError unless `output.file` and the run's folder can be written without replacing a network."""
    file, state = Path(settings.output.file), Path(settings.output.folder or "", STATE)
    if file.suffix.lower() != SUFFIX:
        raise CascadeError(
            f"output.file is {quoted(settings.output.file)}, but a name that ends in {SUFFIX} is expected, such as "
            f"my_style{SUFFIX}."
        )
    for key, path in (("output.file", file), ("output.folder", state)):
        try:
            check_writable(path)
        except CascadeError as error:
            raise CascadeError(f"{key}: {error}") from None
    if file == state:
        raise CascadeError(f"output.file is {file}, where the run keeps its state; give another name.")
    for key, path in {} if keep_existing else input_files(settings).items():
        if file.exists() and path.exists() and os.path.samefile(file, path):
            raise CascadeError(
                f"output.file is {file}, which {key} reads and which would be lost; give another name."
            )


def check_networks(
    settings: Settings, pictures: Sequence[TrainingPicture], find_faces: FindFaces | None = None
) -> None:
    """Raises CascadeError where networks, packages, captions and settings do not fit together; no weights are read."""
    models, captions = (
        settings.models,
        [
            caption
            for picture in pictures
            for caption in trained_captions(picture.captions, settings.data, picture.set)
        ],
    )
    check_trackers(settings.output.log_with)
    check_optimiser(settings.train)
    check_base(settings.train.base_weights)
    compressor, _, _ = load_model(models.compressor, "compressor", read_ahead=False)
    assert isinstance(compressor, SemanticCompressor)
    compressor.config.check_stride(Path(models.compressor).name)
    for kind in DECODERS:
        if (file := getattr(models, kind)) is not None:
            load_model(file, kind, read_ahead=False)
    encoder = TextEncoder.load(models.text_encoder)
    if models.stage_b is not None:
        check_stage_b(models.stage_b, encoder)
    network = _trained_for(settings, compressor)
    if models.image_encoder is not None:
        assert isinstance(network, StageC)
        check_image_prompts(ImageEncoder.load(models.image_encoder).model.config.projection_dim, network)
    check_names(settings.tokens, captions)
    for token in settings.tokens:
        if token.start is not None:
            first_vectors(encoder, token)
    if settings.task == "lora":
        check_lora(settings.lora, settings.tokens, network, encoder)
    elif settings.task == "controlnet":
        assert isinstance(network, StageC)
        check_controlnet(settings.controlnet, network, compressor)
        if settings.controlnet.hint == "identity":
            check_faces(find_faces)
    elif settings.task == "finetune":
        check_finetune(settings, network, encoder.model)


def check_finetune(settings: Settings, network: nn.Module, text_model: nn.Module) -> None:
    """Raises CascadeError where nothing would be trained, or where the run does not fit the card of its preset."""
    finetune, train = settings.finetune, settings.train
    only_text = settings.network == "text_encoder"
    stage = set() if only_text else select_parameters(network, finetune.modules, finetune.depth)
    text = set[str]()
    if settings.text_is_trained:
        text = select_parameters(text_model, finetune.modules if only_text else ("all",))
    if settings.preset is None or train.fsdp:
        return
    half = train.precision != "fp32"
    frozen, copy = (2, 2) if half else (4, 0)  # autocast copies what is trained
    trained = 4 + 4 + STATE_BYTES.get(train.optimizer, 0) + (4 if train.ema else 0) + copy
    quantised = (
        {f"{name}.weight" for name, _ in quantisable(network)} if train.base_weights != "full" else set()
    )
    needed = ACTIVATION_BYTES + sum(
        parameter.numel()
        * (trained if name in stage else QUANTISED_BYTES[train.base_weights] if name in quantised else frozen)
        for name, parameter in network.named_parameters()
    )
    if text:
        needed += sum(
            p.numel() * (trained if name in text else 4) for name, p in text_model.named_parameters()
        )
    if needed > (free := free_bytes(settings.preset)):
        raise CascadeError(
            f"preset {settings.preset} leaves {free / 1e9:.1f} GB, but this finetune takes about {needed / 1e9:.1f} GB "
            "for weights, gradients, the optimiser's state and activations; train a LoRA, less of the network "
            "(finetune.depth or finetune.modules), or a smaller one such as stage_c_lite, or leave preset out."
        )


def _trained_for(settings: Settings, compressor: SemanticCompressor) -> StageC | StageB:
    """The stage that is trained, or trained for, without its weights. Raises CascadeError if its parts do not fit."""
    models = settings.models
    if settings.network != "stage_b" or settings.output.sample_every:
        stage_c, _, _ = load_model(models.stage_c, "stage_c", read_ahead=False)
        assert isinstance(stage_c, StageC)
        if settings.network != "stage_b":
            return stage_c
    stage_b, stage_a = (
        load_model(str(getattr(models, kind)), kind, read_ahead=False)[0] for kind in ("stage_b", "stage_a")
    )
    assert isinstance(stage_b, StageB)
    assert isinstance(stage_a, StageA)
    for name, given, wanted in (
        ("models.stage_a", stage_a.config.c_latent, stage_b.config.c_in),
        ("models.compressor", compressor.config.c_latent, stage_b.config.c_effnet),
    ):
        if given != wanted:
            raise CascadeError(
                f"{name} makes latents of {given} channels, but this Stage B takes {wanted}; choose the one that "
                "belongs to it."
            )
    return stage_b


def check_optimiser(settings: TrainSettings) -> None:
    """Raises CascadeError unless the optimiser is available and, if given by its class, steps and resumes exactly."""
    optimiser_class(settings)
    if settings.optimizer in SOURCES and not settings.optimizer_arguments:
        return
    try:
        resumes = _resumes(partial(build_optimiser, settings=settings))
    except CascadeError:
        raise
    except Exception as error:  # a foreign class may raise anything
        reason = " ".join(str(error).split())[:200]
        raise CascadeError(
            f"train.optimizer {settings.optimizer} with train.optimizer_arguments "
            f"{quoted(settings.optimizer_arguments)} cannot be used ({type(error).__name__}: {reason}); change its "
            "arguments, or choose adamw."
        ) from None
    if not resumes:
        raise CascadeError(
            f"train.optimizer {settings.optimizer} keeps something that a checkpoint does not hold, so a run with it "
            "would not go on as it was; choose another."
        )


def _resumes(build: Callable[..., torch.optim.Optimizer]) -> bool:
    """Whether an optimiser and another one, loaded with its state, take the same steps on a small vector."""
    random = torch.Generator().manual_seed(0)
    values, gradients = torch.randn(600, generator=random), torch.randn(6, 600, generator=random)

    def step(parameter: Tensor, optimiser: torch.optim.Optimizer, rows: slice) -> None:
        for gradient in gradients[rows]:
            parameter.grad = gradient.clone()
            optimiser.step()

    whole = torch.nn.Parameter(values.clone())
    optimiser = build([{"params": [whole]}])
    step(whole, optimiser, slice(3))
    resumed = torch.nn.Parameter(whole.detach().clone())
    other = build([{"params": [resumed]}])
    tensors = {name: value.clone() for name, value in optimiser_tensors(optimiser).items()}
    load_optimiser(other, tensors, Path("a trial"))
    step(whole, optimiser, slice(3, 6))
    step(resumed, other, slice(3, 6))
    return torch.equal(whole, resumed)


def check_image_prompts(width: int, stage_c: StageC) -> None:
    """width: of the image encoder's vectors"""
    if width != stage_c.config.c_clip_img:
        raise CascadeError(
            f"models.image_encoder gives vectors of {width}, but this Stage C takes {stage_c.config.c_clip_img}; "
            "choose the image encoder that belongs to it."
        )


def check_stage_b(file: str, encoder: TextEncoder) -> None:
    """Raises CascadeError for a Stage B, which decodes samples, that does not fit the text encoder."""
    stage_b: Any
    stage_b, _, _ = load_model(file, "stage_b", read_ahead=False)
    width, given = stage_b.config.c_clip, encoder.model.config.projection_dim
    if width != given:
        raise CascadeError(
            f"models.stage_b is {quoted(file)}, which takes vectors of {width}, but the text encoder gives {given}; "
            "name the Stage B and Stage A that belong to it, or models.previewer."
        )


def check_faces(find_faces: FindFaces | None) -> None:
    """Tries to find faces in an empty picture, for which the package and its networks must be installed."""
    if find_faces is None:
        raise CascadeError("The identity hint needs something that finds faces; train it by `cascade train`.")
    for _ in find_faces(torch.zeros(1, 3, 64, 64)):
        pass
