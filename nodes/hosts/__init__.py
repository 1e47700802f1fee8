"""Hosts: the only package that knows which program the nodes run in.

Both hosts are packages with the same functions, listed in `Host`: `comfyui` wraps our networks in ComfyUI's
own classes, `headless` does the same job with nothing but torch.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ...cascade_core.adapters import Adapter
from ...cascade_core.adapters.tokens import NewToken
from ...cascade_core.networks.config import StageBConfig, StageCConfig
from ...cascade_core.run import SamplingResult
from .control import ControlNetDescription
from .run import NetworkDescription, SamplingRequest


class Host(Protocol):
    """Functions that the nodes call. MODEL, CLIP, VAE and the like are the host's own values (`Any` here)."""

    def list_files(self, role: str) -> list[str]:
        """Names that a loader of this role (`roles.FOLDERS`) offers."""
        ...

    def find_file(self, role: str, name: str) -> Path:
        """Path of a name from `list_files`. Raises CascadeError for an unknown name."""
        ...

    def load_network(self, kind: str, path: Path, dtype: str) -> Any:
        """Loads Stage C or Stage B (`kind` stage_c, stage_b) as a MODEL. dtype: a name of `roles.DTYPES`."""
        ...

    def load_stage_a(self, path: Path) -> Any:
        """Loads Stage A as a VAE, whose latents are in the codebook's units."""
        ...

    def load_compressor(self, compressor: Path, previewer: Path | None) -> Any:
        """Loads the compressor, and the previewer as its decoder, as one VAE."""
        ...

    def load_controlnet(self, path: Path) -> Any:
        """Loads a ControlNet as CONTROL_NET."""
        ...

    def load_text_encoder(self, path: Path) -> Any:
        """Loads a CLIP from a file or a folder."""
        ...

    def load_vision(self, path: Path) -> Any:
        """Loads a CLIP_VISION from a file or a folder."""
        ...

    def encode_texts(self, clip: Any, prompts: Sequence[str]) -> list[list]:
        """Encodes each prompt as a CONDITIONING of its own."""
        ...

    def encode_image(self, vision: Any, image: Tensor) -> Any:
        """Encodes images (B, H, W, 3) as CLIP_VISION_OUTPUT: `.image_embeds` is (B, E)."""
        ...

    def describe_network(self, model: Any) -> NetworkDescription:
        """Describes a MODEL and the widths of its inputs."""
        ...

    def first_non_finite(self, value: Any) -> str | None:
        """First weight of a MODEL, CLIP, VAE or CLIP_VISION with NaN or infinity, or None.

        For example "clf.1.weight of stage_c.safetensors (Stage C)".
        """
        ...

    def describe_vae(self, vae: Any) -> str:
        """Kind of a VAE: stage_a, compressor, or a description of any other."""
        ...

    def encode_pixels(self, vae: Any, image: Tensor, tile_pixels: int = 0) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> a latent in socket units; `tile_pixels`: as in decode_latent, for Stage A only."""
        ...

    def decode_latent(self, vae: Any, latent: Tensor, tile_pixels: int) -> Tensor:
        """A latent in socket units -> (B, H, W, 3) in [0, 1]; `tile_pixels`: a tile's side, 0: no tiles."""
        ...

    def describe_controlnet(self, control_net: Any) -> ControlNetDescription:
        """Describes a CONTROL_NET and its hint."""
        ...

    def apply_controlnet(
        self,
        positive: list,
        negative: list,
        control_net: Any,
        hint: Tensor,
        strength: float,
        start: float,
        end: float,
    ) -> tuple[list, list]:
        """Adds a ControlNet to both prompts; hint: (B, H, W, C), start and end: shares of the schedule."""
        ...

    def stage_config(self, model: Any) -> StageCConfig | StageBConfig:
        """Configuration of a Stage C or Stage B MODEL."""
        ...

    def text_network(self, clip: Any) -> nn.Module:
        """Network of a CLIP, whose layers have transformers' names. Raises CascadeError for another CLIP."""
        ...

    def with_adapter(
        self,
        model: Any,
        clip: Any,
        adapter: Adapter,
        strength_model: float,
        strength_clip: float,
        new_tokens: Sequence[NewToken],
    ) -> tuple[Any, Any]:
        """Adds a LoRA, which fits both, to copies of a MODEL and a CLIP (or None).

        new_tokens: names of the adapter's tokens that are numbered after the vocabulary.
        """
        ...

    def notify(self, text: str, in_panel: bool = False) -> None:
        """Sends the user a message about the running node, beside its progress.

        in_panel: the node also returns it as `ui`; a host whose panels show that does not repeat it beside the node
        """
        ...

    def data_path(self, name: str) -> Path:
        """Path of a file or folder of training data, by its name in the input folder or by path.

        Raises CascadeError for a path that a client of the host must not read, whether it exists or not.
        """
        ...

    def data_check(self) -> Callable[[Path], None] | None:
        """A function that raises CascadeError for a link in training data whose target clients must not read.

        None where everything may be read.
        """
        ...

    def new_files_folder(self, role: str) -> Path:
        """Folder for new files of that role, where its loader finds them."""
        ...

    def training_folder(self) -> Path:
        """Folder of the runs' checkpoints, logs, samples and latents, which the host does not serve to clients."""
        ...

    def former_training_folder(self) -> Path:
        """Folder in which earlier versions kept runs by task and name."""
        ...

    def input_folder(self) -> Path | None:
        """Folder of pictures that the host's Load Image offers to everybody; None where it has no such folder."""
        ...

    def interrupted(self) -> bool:
        """Whether the running prompt was asked to stop."""
        ...

    def training(self) -> AbstractContextManager[Callable[..., None]]:
        """Yields a function report(step, steps, picture) that moves the node's bar and shows a PIL picture (None: no
        change).

        Gradients are enabled inside the block. A run that was asked to stop ends the graph after the block.
        """
        ...

    def sample(self, request: SamplingRequest) -> SamplingResult:
        """The sampled latent in the units of sockets, with the run's time and memory."""
        ...

    def with_guidance(self, model: Any, cfg_rescale: float, shift: float) -> Any:
        """Returns the MODEL with the published guidance and schedule for the host's own samplers."""
        ...


def host() -> Host:
    """Returns ComfyUI's host where this process is ComfyUI, else the headless host.

    A ComfyUI that is merely installed does not count: its modules are loaded before any pack's.
    """
    if "comfy.model_management" in sys.modules:
        from . import comfyui

        return cast(Host, comfyui)
    from . import headless

    return cast(Host, headless)
