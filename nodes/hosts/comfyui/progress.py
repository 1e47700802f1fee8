# pyright: reportMissingImports=false
"""Progress and live previews in ComfyUI."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor, nn

from ....cascade_core import checkpoints
from ....cascade_core.errors import CascadeError
from .. import roles
from . import folders

# ComfyUI's preview methods that a learned previewer may replace.
LEARNED = (LatentPreviewMethod.Auto, LatentPreviewMethod.TAESD)
# Previewer of each stage's latents, and its configuration's name for their channels.
PREVIEWERS = {"stage_c": ("previewer", "c_in"), "stage_b": ("stage_a", "c_latent")}


def notify(text: str) -> None:
    """Writes a message to the log, and into the running node in the browser of who queued it.

    Browsers take it for HTML, and it may hold names that strangers chose: nothing of it is left that acts.
    """
    text = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    ).translate({ord("<"): "‹", ord(">"): "›"})
    logging.info("%s", text)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node, client = getattr(server, "last_node_id", None), getattr(server, "client_id", None)
    if server is not None and node is not None and client is not None:  # without one, everybody would read it
        server.send_progress_text(text, node, client)


class LearnedPreviewer(latent_preview.LatentPreviewer):
    """Previewer that decodes Stage C's latent with the previewer network, or Stage B's with Stage A."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.to_picture: Callable[[Tensor], Tensor] = getattr(network, "decode", network)

    def decode_latent_to_preview(self, x0: Tensor) -> Image.Image:
        weight = next(self.network.parameters())
        with torch.inference_mode():
            picture = self.to_picture(x0[:1].to(weight)).clamp(0, 1)[0]  # (3, H, W)
        return Image.fromarray((picture * 255).round().byte().movedim(0, -1).cpu().numpy())


def step_callback(patcher: Any, steps: int, kind: str) -> Callable[..., None]:
    """Callback (step, x0, x, steps) for each step that moves the node's bar and shows a preview of x0.

    The preview is a learned one where its file exists, else ComfyUI's approximation.
    """
    previewer = learned_previewer(patcher, kind) if args.preview_method in LEARNED else None
    if previewer is None:
        return latent_preview.prepare_callback(patcher, steps)
    bar = comfy.utils.ProgressBar(steps)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        bar.update_absolute(step + 1, total, previewer.decode_latent_to_preview_image("JPEG", x0))

    return callback


def learned_previewer(patcher: Any, kind: str) -> LearnedPreviewer | None:
    """Learned previewer of the MODEL's own family. Stage B has one in the demo alone: its Stage A, which is fast.

    ComfyUI's approximation of Stage B's latents fits the published Stage A, which is slow.
    """
    file = getattr(patcher.model.diffusion_model, "name", "")
    role, channels = PREVIEWERS[kind]
    if file == roles.DEMO_NAMES[kind]:
        path = roles.demo_file(role)
    else:
        path = published_previewer() if kind == "stage_c" else None
    if path is None:
        return None
    try:
        network, _, config = checkpoints.load_model(path, expect=role, dtype=torch.float32)
    except CascadeError:  # a damaged file must not stop a run that can do without it
        return None
    fits = config[channels] == patcher.model.latent_format.latent_channels
    return LearnedPreviewer(network.to(comfy.model_management.get_torch_device())) if fits else None


def published_previewer() -> Path | None:
    """Finds the published previewer by the contents of the files."""
    demo = roles.demo_file("previewer")
    for name in folders.list_files("previewer"):
        path = folders.find_file("previewer", name)
        if path != demo and checkpoints.holds(path, "previewer"):
            return path
    return None
