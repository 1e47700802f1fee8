"""Makes one fixed picture by the front door, stage by stage, so that memory holds only one stage's networks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cascade_core.accelerators import peak_bytes
from ...cascade_core.arguments import DECODER, PRIOR, StageSettings
from ...cascade_core.checkpoints import locate, parts_in
from ...cascade_core.checkpoints.source import read_shapes
from ...cascade_core.errors import CascadeError
from ...cascade_core.model_files import PARTS, ModelFiles
from ...cascade_core.pipeline import StableCascade, StageProgress
from ...cascade_core.run import process_peak
from ...cascade_core.stages.device import ComputeDevice
from ...cascade_core.stages.prompt import Prompt
from ..catalogue import in_words
from .machine import free_memory
from .networks import PROMPT

ROLES = ("text_encoder", "stage_c", "stage_b", "stage_a")
MARGIN = 1.15  # memory that a stage takes, as a multiple of its weights
WITHOUT_RESCALE = replace(PRIOR, cfg_rescale=0.0), replace(DECODER, cfg_rescale=0.0)


class Skipped(CascadeError):  # noqa: N818 (not an error)
    """The picture was not made, for a reason that is not a fault."""


@dataclass(frozen=True)
class PictureRun:
    """Settings of the picture: the published ones, without the rescale of guidance, which diffusers lacks."""

    prompt: str = PROMPT
    negative: str = ""
    size: tuple[int, int] = (1024, 1024)
    seed: int = 7
    prior: StageSettings = WITHOUT_RESCALE[0]
    decoder: StageSettings = WITHOUT_RESCALE[1]

    @classmethod
    def small(cls, size: tuple[int, int] = (512, 512), steps: tuple[int, int] = (8, 4)) -> PictureRun:
        """A smaller and faster picture."""
        prior, decoder = (replace(stage, steps=n) for stage, n in zip(WITHOUT_RESCALE, steps, strict=True))
        return cls(size=size, prior=prior, decoder=decoder)

    def settings(self) -> dict[str, Any]:
        """The settings for JSON."""
        return asdict(self)


@dataclass
class MadePicture:
    """Result of a run.

    prompts  positive and negative, encoded
    latent   (1, 16, h, w), Stage C's
    pixels   (1, H, W, 3) in [0, 1]
    """

    prompts: tuple[Prompt, Prompt]
    latent: Tensor
    pixels: Tensor
    device: str
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def find_files(roots: Iterable[Path], prefer: str, dtype: str) -> dict[str, Path]:
    """The file for each role of a picture, as the front door chooses it. Raises Skipped where one is missing."""
    folders = [ModelFiles(root, prefer=prefer, full_precision=dtype == "fp32") for root in roots]
    found: dict[str, Path] = {}
    for role in ROLES:
        path = next((path for files in folders if (path := files.find_optional(role)) is not None), None)
        if path is None:
            raise Skipped(
                f"there is no {role} file here; `cascade fetch` gets the published ones (text_to_image_bf16)."
            )
        found[role] = path
    return found


def check_memory(files: Mapping[str, Path], dtype: str, device: str) -> None:
    """Raises Skipped where the weights of a stage would not fit into free main memory.

    Weights cast to another precision are copies; others are mapped from the file and take no memory.
    """
    compute = ComputeDevice(device)
    free = free_memory()
    if free is None:
        return
    precisions = {"stage_c": compute.weight_dtype(dtype), "stage_b": compute.weight_dtype(dtype)}
    precisions |= {"text_encoder": compute.encoder_dtype()}
    copies = {role: _copied_bytes(files[role], role, precision) for role, precision in precisions.items()}
    needed = int(MARGIN * (copies["text_encoder"] + max(copies["stage_c"], copies["stage_b"])))
    if needed > free:
        raise Skipped(
            f"it would take {in_words(needed)} of main memory with dtype {dtype}, but {in_words(free)} are free; "
            "choose --dtype bf16 or --prefer lite."
        )


def _copied_bytes(path: Path, role: str, dtype: torch.dtype) -> int:
    """Bytes of the cast copies of a network's weights."""
    tensors = read_shapes(locate(path, PARTS[role]))
    weights = parts_in(tensors)[PARTS[role]].to_published(tensors)
    return sum(tensor.numel() * dtype.itemsize for tensor in weights.values() if tensor.dtype != dtype)


def make_picture(
    run: PictureRun,
    files: Mapping[str, Path],
    dtype: str,
    device: str,
    memory: str | None,
    progress: Any,
) -> MadePicture:
    """The picture of a run, by `StableCascade.prior` and `decode`. Raises CascadeError as they do."""
    seconds: dict[str, float] = {}
    peaks: list[int] = []

    def step(stage: StageProgress) -> None:
        progress.node_step(stage.step, stage.steps, None)

    @contextmanager
    def cascade(part: str) -> Iterator[StableCascade]:
        begun = time.perf_counter()
        folder = Path(files["stage_c"]).parent
        chosen: dict[str, Any] = dict(files)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "memory": memory, "size": run.size}
        with StableCascade.load(folder, prior=run.prior, decoder=run.decoder, **options, **chosen) as loaded:
            yield loaded
            peaks.append(_peak_bytes(loaded.device.device))
        seconds[part] = round(time.perf_counter() - begun, 2)

    texts: dict[str, Any] = {"negative": run.negative, "seed": run.seed, "callback": step}
    with cascade("stage_c") as loaded:
        encode = loaded.text_stage().encode
        prompts = encode([run.prompt]), encode([run.negative])
        del encode  # else the encoder would stay in memory beside Stage B
        latent = loaded.prior(run.prompt, **texts)
        weights = str(loaded.device.weight_dtype(dtype)).removeprefix("torch.")
        used = str(loaded.device.device)
    with cascade("stage_b_and_a") as loaded:
        pixels = loaded.decode(latent, run.prompt, output="tensor", **texts)
    return MadePicture(prompts, latent, pixels, used, weights, seconds, max(peaks))


def _peak_bytes(device: torch.device) -> int:
    """Peak of a card's memory since its last run began, or of main memory."""
    return process_peak() if device.type == "cpu" else peak_bytes(device)
