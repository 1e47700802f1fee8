"""Faces and who they are, by InsightFace: an optional package, imported when a face is first looked for.

Its two networks are looked up like any model file (`models/insightface/models/buffalo_l`), then where InsightFace
itself keeps them; nothing is downloaded.
"""

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cascade_core.errors import CascadeError
from .hosts import host

PACK = "models/buffalo_l"
DETECTOR, RECOGNISER = f"{PACK}/det_10g.onnx", f"{PACK}/w600k_r50.onnx"  # as published
OWN_FOLDER = Path("~/.insightface")
DETECTION_SIZE = (320, 320)  # as published
INSTALL = "python -m pip install insightface onnxruntime"


@dataclass(frozen=True)
class Faces:
    """The faces of one picture.

    embeddings: (N, 512) ArcFace's, of any length; boxes: (N, 4), left, top, right and bottom in pixels.
    """

    embeddings: Tensor
    boxes: Tensor


def find_faces(images: Tensor, most: int) -> Iterator[Faces]:
    """The faces of each picture, at most `most`: the largest in the middle first.  images: (B, H, W, 3) in [0, 1]"""
    face_class, load = _insightface()
    detector, recogniser = (load(network_file(name)) for name in (DETECTOR, RECOGNISER))
    detector.prepare(ctx_id=-1, input_size=DETECTION_SIZE)
    for image in images:
        pixels = image.mul(255).clamp(0, 255).to("cpu", torch.uint8).flip(-1).contiguous().numpy()  # BGR
        boxes, landmarks = detector.detect(pixels, max_num=most)
        faces = [
            face_class(bbox=box[:4], kps=points, det_score=box[4])
            for box, points in zip(boxes, landmarks, strict=True)
        ]
        embeddings = [torch.from_numpy(recogniser.get(pixels, face)) for face in faces]
        yield Faces(
            torch.stack(embeddings) if embeddings else torch.zeros(0, 512),
            torch.from_numpy(boxes[:, :4]).float(),
        )


def _insightface() -> tuple[Any, Any]:
    """The class of a face, and what loads a network from a file."""
    try:
        from insightface.app.common import Face  # pyright: ignore[reportMissingImports]
        from insightface.model_zoo.model_zoo import get_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CascadeError(
            f"Cascade Identity Hint needs InsightFace, which cannot be imported ({error}); install it in this Python "
            f"with: {INSTALL}"
        ) from error

    def load(path: Path) -> Any:
        with redirect_stdout(StringIO()):  # it prints which device it chose
            return get_model(str(path), providers=["CPUExecutionProvider"])

    return Face, load


def network_file(name: str) -> Path:
    """A file of PACK among the models, or in InsightFace's own folder; CascadeError where it is in neither."""
    try:
        return host().find_file("face", name)
    except CascadeError:
        own = OWN_FOLDER.expanduser() / name
        if own.is_file():
            return own
        raise
