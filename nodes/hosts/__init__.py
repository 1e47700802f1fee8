"""The only place that knows which program the nodes run in.

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
from ...cascade_core.networks.config import StageCConfig
from .control import Control
from .run import Network, Run, Sampled


class Host(Protocol):
    """What the nodes ask of a host. MODEL, CLIP, VAE and the like are the host's own values (`Any` here)."""

    def list_files(self, role: str) -> list[str]:
        """The names that a loader of this role (`roles.FOLDERS`) offers."""
        ...

    def find_file(self, role: str, name: str) -> Path:
        """Where a name from `list_files` lies; CascadeError where there is none."""
        ...

    def load_network(self, kind: str, path: Path, dtype: str) -> Any:
        """Stage C or Stage B (`kind` stage_c, stage_b) as a MODEL. dtype: a name of `roles.DTYPES`."""
        ...

    def load_stage_a(self, path: Path) -> Any:
        """Stage A as a VAE, whose latents are in the codebook's units."""
        ...

    def load_compressor(self, compressor: Path, previewer: Path | None) -> Any:
        """The compressor, and the previewer as its decoder, as one VAE."""
        ...

    def load_controlnet(self, path: Path) -> Any:
        """A ControlNet as CONTROL_NET."""
        ...

    def load_text_encoder(self, path: Path) -> Any:
        """A CLIP from a file or a folder."""
        ...

    def load_vision(self, path: Path) -> Any:
        """A CLIP_VISION from a file or a folder."""
        ...

    def encode_text(self, clip: Any, prompt: str) -> list:
        """CONDITIONING of one prompt."""
        ...

    def encode_image(self, vision: Any, image: Tensor) -> Any:
        """CLIP_VISION_OUTPUT of images (B, H, W, 3): `.image_embeds` is (B, E)."""
        ...

    def describe_network(self, model: Any) -> Network:
        """What a MODEL is and how wide its inputs are."""
        ...

    def first_non_finite(self, model: Any) -> str | None:
        """The first weight of a MODEL, CLIP, VAE or CLIP_VISION that holds NaN or infinity, or None.

        Such as "clf.1.weight of stage_c.safetensors (Stage C)".
        """
        ...

    def describe_vae(self, vae: Any) -> str:
        """stage_a, compressor, or the name of what else it is."""
        ...

    def encode_pixels(self, vae: Any, image: Tensor, tile: int = 0) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> a latent in socket units; `tile`: as in decode_latent, of Stage A alone."""
        ...

    def decode_latent(self, vae: Any, latent: Tensor, tile: int) -> Tensor:
        """A latent in socket units -> (B, H, W, 3) in [0, 1]; `tile`: pixels a side, 0: no tiles."""
        ...

    def describe_controlnet(self, control_net: Any) -> Control:
        """What a CONTROL_NET is and what it takes."""
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
        """Both prompts with a ControlNet more; hint: (B, H, W, C), start and end: shares of the schedule."""
        ...

    def stage_c_config(self, model: Any) -> StageCConfig:
        """The size of a Stage C MODEL."""
        ...

    def text_network(self, clip: Any) -> nn.Module:
        """The network of a CLIP, whose layers have transformers' names; CascadeError for another CLIP."""
        ...

    def with_adapter(
        self,
        model: Any,
        clip: Any,
        adapter: Adapter,
        strength_model: float,
        strength_clip: float,
        new: Sequence[NewToken],
    ) -> tuple[Any, Any]:
        """A Stage C MODEL and a CLIP (or None) with a LoRA more, which fits both; the given ones stay as they are.

        new: names of the adapter's tokens behind the vocabulary.
        """
        ...

    def notify(self, text: str) -> None:
        """Sends the user a message about the running node, beside its progress."""
        ...

    def picture_folder(self, name: str) -> Path:
        """A folder of training pictures, by its name in the input folder or by path."""
        ...

    def new_file(self, role: str, name: str) -> Path:
        """Where a new file of that role goes, to be found by its loader under its name."""
        ...

    def run_folder(self, name: str) -> Path:
        """Where a training run keeps its checkpoint, log and samples."""
        ...

    def training(self) -> AbstractContextManager[tuple[Callable[[int, int], None], Callable[[], bool]]]:
        """(report, stop) of a run: report(step, steps) moves the node's bar, stop() says whether it should end.

        Inside the block gradients are computed. A run that was asked to end ends the graph after the block.
        """
        ...

    def sample(self, run: Run) -> Sampled:
        """The sampled latent, and what the run took."""
        ...

    def with_guidance(self, model: Any, cfg_rescale: float, shift: float) -> Any:
        """The MODEL with the published guidance and schedule for the host's own samplers."""
        ...


def host() -> Host:
    """ComfyUI where this process is one, else the headless host.

    A ComfyUI that is merely installed does not count: its modules are loaded before any pack's.
    """
    if "comfy.model_management" in sys.modules:
        from . import comfyui

        return cast(Host, comfyui)
    from . import headless

    return cast(Host, headless)
