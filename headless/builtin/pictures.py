"""LoadImage, LoadImageMask, SaveImage and PreviewImage."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cascade_core.errors import CascadeError, quoted
from ...cascade_core.pictures import open_picture
from ...cascade_core.reading import open_regular
from ...nodes.api import io
from ..folders import current_folders
from ..pictures import encode_png, read_image, read_mask
from ..running import running_node
from ..saving import check_folder, check_prefix, next_counter, numbered, resolve_prefix, save_new
from ..summary import Summary, parameters, summarise


def _picture_input() -> io.Combo.Input:
    return io.Combo.Input(
        "image",
        options=current_folders().pictures(),
        upload=io.UploadType.image,
        tooltip="A picture in the input folder, or a path from the graph's folder or the current one.",
    )


def _content_hash(name: str) -> str:
    with open_regular(current_folders().find_picture(name)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_there(name: object) -> bool | str:
    if not isinstance(name, str):
        return f"{quoted(name)} is not the name of a file."
    try:
        # Checks its header; pixels are read when the node runs.
        with open_picture(current_folders().find_picture(name)):
            return True
    except CascadeError as error:
        return str(error)


class LoadImage(io.ComfyNode):
    """Loads a picture file as IMAGE and MASK."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImage",
            display_name="Load Image",
            category="image",
            description="Reads a picture. The mask is 1 where it is transparent.",
            inputs=[_picture_input()],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def validate_inputs(cls, image: str) -> bool | str:
        return _is_there(image)

    @classmethod
    def fingerprint_inputs(cls, image: str) -> str:
        return _content_hash(image)

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        return io.NodeOutput(*read_image(current_folders().find_picture(image)))


class LoadImageMask(io.ComfyNode):
    """Loads one channel of a picture file as MASK."""

    CHANNELS = ("alpha", "red", "green", "blue")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImageMask",
            display_name="Load Image (as Mask)",
            category="mask",
            description="Reads one channel of a picture as a mask; alpha is inverted.",
            inputs=[
                _picture_input(),
                io.Combo.Input("channel", options=list(cls.CHANNELS), tooltip="The channel to read."),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def validate_inputs(cls, image: str) -> bool | str:
        return _is_there(image)

    @classmethod
    def fingerprint_inputs(cls, image: str, channel: str) -> str:
        return _content_hash(image)

    @classmethod
    def execute(cls, image: str, channel: str) -> io.NodeOutput:
        if channel not in cls.CHANNELS:
            raise CascadeError(f"channel is {quoted(channel)}, but must be one of {', '.join(cls.CHANNELS)}.")
        return io.NodeOutput(read_mask(current_folders().find_picture(image), channel))


def _can_save(prefix: str | None, kind: str) -> bool | str:
    """Whether pictures can be saved under a prefix (None: not known yet); checked before the work."""
    folder = current_folders().of_kind(kind)
    try:
        check_folder(folder)
        if prefix is not None:
            check_prefix(prefix, folder)
    except CascadeError as error:
        return str(error)
    return True


def _save_batch(images: Tensor, prefix: str, kind: str, hidden: Any) -> dict[str, Any]:
    """Writes a batch (B, H, W, C) into the folder of this kind; returns the `ui` dictionary."""
    if images.dim() != 4 or images.shape[-1] not in (1, 3, 4):
        shape = tuple(images.shape)
        raise CascadeError(f"images has the shape {shape}, but (batch, height, width, 3) was expected.")
    root = current_folders().of_kind(kind)
    folder, start = resolve_prefix(prefix, root, images.shape[2], images.shape[1])
    texts = {"prompt": hidden.prompt} if hidden.prompt is not None else {}
    texts |= hidden.extra_pnginfo or {}
    summary = summarise(hidden.prompt, running_node()) if hidden.prompt is not None else Summary()
    subfolder = folder.relative_to(root).as_posix().removeprefix(".")
    saved = []
    for index, image in enumerate(images):
        if not torch.isfinite(image).all():
            raise CascadeError(f"Picture {index} of the batch holds NaN or infinity, so it was not saved.")
        name = start.replace("%batch_num%", str(index))
        spoken = parameters(summary, images.shape[2], images.shape[1], len(images), index)
        data = encode_png(image, texts, spoken)
        path = save_new(folder, partial(numbered, name), next_counter(folder, name), data)
        saved.append({"filename": path.name, "subfolder": subfolder, "type": kind})
    return {"images": saved}


class SaveImage(io.ComfyNode):
    """Saves pictures as PNG files that contain the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            description="Writes pictures into the output folder, with the graph that made them inside.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="Start of the name; may hold a folder, %width%, %height%, %year% … %second%.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        return _can_save(filename_prefix, "output")

    @classmethod
    def fingerprint_inputs(cls, images: None, filename_prefix: str) -> str:
        return str(current_folders().output.resolve())  # so that another output folder saves again

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str) -> io.NodeOutput:
        return io.NodeOutput(ui=_save_batch(images, filename_prefix, "output", cls.hidden))


class PreviewImage(io.ComfyNode):
    """Saves pictures in `temp` inside the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            description="Writes pictures into the folder temp inside the output folder.",
            inputs=[io.Image.Input("images", tooltip="The pictures to look at.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, images: None) -> bool | str:
        return _can_save("preview", "temp")

    @classmethod
    def fingerprint_inputs(cls, images: None) -> str:
        return str(current_folders().temp.resolve())

    @classmethod
    def execute(cls, images: Tensor) -> io.NodeOutput:
        return io.NodeOutput(ui=_save_batch(images, "preview", "temp", cls.hidden))
