"""Face detection and ArcFace embeddings by InsightFace, an optional package that is imported on first use.

Its two networks are looked up like any model file (`models/insightface/models/buffalo_l`), then in InsightFace's own
folder; nothing is downloaded.
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
    """Faces of one picture.

    embeddings: (N, 512) ArcFace's, of any length; boxes: (N, 4), left, top, right and bottom in pixels.
    """

    embeddings: Tensor
    boxes: Tensor


def find_faces(images: Tensor, max_faces: int) -> Iterator[Faces]:
    """Faces of each picture, at most `max_faces`: large ones near the middle first.  images: (B, H, W, 3) in [0, 1]"""
    face_class, load = _insightface()
    detector, recogniser = (load(network_file(name)) for name in (DETECTOR, RECOGNISER))
    detector.prepare(ctx_id=-1, input_size=DETECTION_SIZE)
    for image in images:
        pixels = image.mul(255).clamp(0, 255).to("cpu", torch.uint8).flip(-1).contiguous().numpy()  # BGR
        boxes, landmarks = detector.detect(pixels, max_num=max_faces)
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
    """InsightFace's class of a face, and a function that loads a network from a file."""
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
    """Finds a file of PACK among the models or in InsightFace's own folder. Raises CascadeError if it is in neither."""
    try:
        return host().find_file("face", name)
    except CascadeError:
        path = OWN_FOLDER.expanduser() / name
        if path.is_file():
            return path
        raise
