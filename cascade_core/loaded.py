"""The networks of a cascade, loaded as they are first needed, with the LoRAs that are applied to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .adapters import Adapter
from .adapters.apply import Patch
from .adapters.tokens import NewToken
from .errors import CascadeError, quoted
from .model_files import ModelFiles
from .stages.codec import Codec, load_compressor, load_stage_a
from .stages.control import ControlNetStage, load_controlnet
from .stages.device import ComputeDevice
from .stages.diffusion import DiffusionStage, load_stage
from .stages.hint import Control
from .stages.prompt import TextStage, VisionStage, load_image_encoder, load_text_encoder

T = TypeVar("T")
KINDS = ["stage_c", "stage_b"]
CLOSED = "This StableCascade was closed; load it again."


@dataclass(frozen=True)
class AppliedLoRA:
    """A LoRA or learned token with its strengths."""

    adapter: Adapter
    strength: float
    text_strength: float
    new_tokens: tuple[NewToken, ...]


class LoadedNetworks:
    """The networks of one cascade, used by one call at a time; another thread's call waits."""

    def __init__(self, files: ModelFiles, device: ComputeDevice, dtype: str):
        device.weight_dtype(dtype)  # refuses an unknown dtype before a file is read
        self.files, self.device, self.dtype = files, device, dtype
        self._loaded: dict[tuple[str, Path], Any] = {}
        self._loras: dict[str, AppliedLoRA] = {}
        self._lock = threading.RLock()
        self._depth = 0  # depth of nested calls, made by callbacks
        self._cancelled = threading.Event()
        self._closed = False

    def cancel(self) -> None:
        """Ends the call that is running in another thread, which raises Interrupted there."""
        self._cancelled.set()

    def close(self) -> None:
        """Gives the memory back. The object cannot be used any more."""
        with self._lock:
            self._loaded.clear()
            self._loras.clear()
            self.device.close()
            self._closed = True

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One call at a time."""
        with self._lock:
            if self._closed:
                raise CascadeError(CLOSED)
            if not self._depth:  # a call within a callback must not reset the outer one's cancellation
                self._cancelled.clear()
            # The caller's autocast and default device are meant for the caller's own networks.
            elsewhere = torch.get_default_device().type != "cpu"
            default_device = torch.device("cpu") if elsewhere else nullcontext()
            with (
                torch.inference_mode(),
                torch.autocast(self.device.device.type, enabled=False),
                default_device,
            ):
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    def _load(self, role: str, path: Path, load: Callable[[Path], T]) -> T:
        if self._closed:  # closed by a callback, or before a late preview
            raise CascadeError(CLOSED)
        if (role, path) not in self._loaded:
            self._loaded[role, path] = load(path)
        return self._loaded[role, path]

    def stage(self, kind: str) -> DiffusionStage:
        """Stage C or Stage B (kind stage_c, stage_b) as loaded, without changes by LoRAs."""
        if kind not in KINDS:
            raise CascadeError(f"kind is {quoted(kind)}; choose {' or '.join(KINDS)}.")
        path = self.files.find(kind)
        return self._load(kind, path, lambda path: load_stage(kind, path, self.dtype, self.device))

    def text_stage(self) -> TextStage:
        """The text encoder as loaded."""
        path = self.files.find("text_encoder")
        return self._load("text_encoder", path, lambda path: load_text_encoder(path, self.device))

    def vision_stage(self) -> VisionStage:
        """The image encoder."""
        path = self.files.find("vision")
        return self._load("vision", path, lambda path: load_image_encoder(path, self.device))

    def stage_a(self) -> Codec:
        """Stage A, which encodes and decodes Stage B's latents."""
        path = self.files.find("stage_a")
        return self._load("stage_a", path, lambda path: load_stage_a(path, self.device))

    def compressor(self) -> Codec:
        """The semantic compressor, with the previewer as its decoder where there is one."""
        path, previewer = self.files.find("compressor"), self.files.find_optional("previewer")
        return self._load("compressor", path, lambda path: load_compressor(path, previewer, self.device))

    def controlnet(self, file: str | Path) -> ControlNetStage:
        """A ControlNet by its path, or its name in the folder's `controlnet`."""
        path = self.files.named("controlnet", file)
        return self._load("controlnet", path, lambda path: load_controlnet(path, self.device))

    def _with_loras(self, kind: str) -> DiffusionStage:
        stage = self.stage(kind)
        patches = tuple(
            Patch(lora.adapter.name, changes, lora.strength)
            for lora in self._loras.values()
            if (changes := getattr(lora.adapter, kind)) and lora.strength
        )
        return replace(stage, patches=patches)

    def _text_with_loras(self) -> TextStage:
        text = self.text_stage()
        for lora in self._loras.values():
            if lora.text_strength:
                text = text.with_adapter(lora.adapter, lora.text_strength, lora.new_tokens)
        return text

    def _check_files(self, *roles: str, controls: Sequence[Control] = ()) -> None:
        """Raises CascadeError for a file that is missing, before another one is loaded."""
        for role in roles:
            self.files.find(role)
        for control in controls:
            self.files.named("controlnet", control.file)
