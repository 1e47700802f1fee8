"""What can be known of a run before its networks are loaded and its pictures are encoded: whether it can end well."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoints import load_model
from ..checkpoints.files import check_writable
from ..errors import CascadeError, quoted
from ..networks.compressor import SemanticCompressor
from ..networks.stage_c import StageC
from ..text.encoder import TextEncoder
from ..vision import ImageEncoder
from .data.hints import FindFaces
from .data.pictures import TrainingPicture
from .identity import input_files
from .optimisers import optimiser_class
from .settings import Settings
from .state import STATE
from .tasks.controlnet import check_controlnet
from .tasks.finetune import select_parameters
from .tasks.lora import check_lora
from .tasks.textual_inversion import check_names

SUFFIX = ".safetensors"


def check_output(settings: Settings, keep_existing: bool = False) -> None:
    """Raise CascadeError unless `output.file` and the run's folder can be written, and no network is lost by it."""
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
    """Raise CascadeError where networks, packages, captions and settings do not go together; no weights are read."""
    models, captions = settings.models, [caption for picture in pictures for caption in picture.captions]
    optimiser_class(settings.train)
    stage_c, _, _ = load_model(models.stage_c, "stage_c", read_ahead=False)
    compressor, _, _ = load_model(models.compressor, "compressor", read_ahead=False)
    assert isinstance(stage_c, StageC)
    assert isinstance(compressor, SemanticCompressor)
    compressor.config.check_stride(Path(models.compressor).name)
    if models.previewer is not None:
        load_model(models.previewer, "previewer", read_ahead=False)
    if models.image_encoder is not None:
        check_image_prompts(ImageEncoder.load(models.image_encoder).model.config.projection_dim, stage_c)
    encoder = TextEncoder.load(models.text_encoder)
    check_names(settings.tokens, captions)
    if settings.task == "lora":
        check_lora(settings.lora, settings.tokens, stage_c, encoder)
    elif settings.task == "controlnet":
        check_controlnet(settings.controlnet, stage_c, compressor)
        if settings.controlnet.hint == "identity":
            check_faces(find_faces)
    elif settings.task == "finetune":
        select_parameters(stage_c, settings.finetune.modules)


def check_image_prompts(width: int, stage_c: StageC) -> None:
    """width: of the image encoder's vectors"""
    if width != stage_c.config.c_clip_img:
        raise CascadeError(
            f"models.image_encoder gives vectors of {width}, but this Stage C takes {stage_c.config.c_clip_img}; "
            "choose the image encoder that belongs to it."
        )


def check_faces(find_faces: FindFaces | None) -> None:
    """Find the faces of an empty picture, for which the package and its networks must be there."""
    if find_faces is None:
        raise CascadeError("The identity hint needs something that finds faces; train it by `cascade train`.")
    for _ in find_faces(torch.zeros(1, 3, 64, 64)):
        pass
