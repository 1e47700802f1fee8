# pyright: reportMissingImports=false
"""Progress and live previews in ComfyUI."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import comfy.model_management
import comfy.options
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor

from ....cascade_core import checkpoints
from ....cascade_core.errors import CascadeError, quoted
from ....cascade_core.geometry import STAGE_B_COMPRESSION
from .. import roles
from ..previews import ColourFactors, Pace, Previewer, Previews
from . import folders

# ComfyUI's preview methods that a learned previewer may replace.
LEARNED = (LatentPreviewMethod.Auto, LatentPreviewMethod.TAESD)
# For each stage: the previewer of its latents, the config entry of their channels, and its pixels per position.
PREVIEWERS = {"stage_c": ("previewer", "c_in", 8), "stage_b": ("stage_a", "c_latent", STAGE_B_COMPRESSION)}
LEARNED_SIDE = 256  # largest side of a learned previewer's pictures, for their memory and time
# Attribute of a model for its learned previewer and the files that it was chosen from.
KEPT = "cascade_previewer"
POLL = 5e-4  # seconds between two polls of a card


def running_server() -> Any:
    """ComfyUI's server of this process, or None."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def notify(text: str, in_panel: bool = False) -> None:
    """Writes a message to the log, and into the running node in the browser of who queued it.

    Browsers read it as HTML, and it may contain names chosen by strangers, so everything active is escaped.

    in_panel: the node's panel shows it as a result of the run, so here it only goes to the log
    """
    text = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    ).translate({ord("<"): "‹", ord(">"): "›"})
    logging.info("%s", text)
    if in_panel:
        return
    server = running_server()
    node, client = getattr(server, "last_node_id", None), getattr(server, "client_id", None)
    if server is not None and node is not None and client is not None:  # else all would get it
        server.send_progress_text(text, node, client)


def step_callback(patcher: Any, steps: int, kind: str) -> Callable[..., None]:
    """Callback (step, x0, x, steps) for each step that moves the node's bar and shows previews of x0.

    ComfyUI's server thread encodes them as JPEG.
    """
    bar = comfy.utils.ProgressBar(steps)
    previews = previews_of_run(patcher, kind) if bar.hook is not None else Previews(None)
    pace = Pace()

    def show(step: int, total: int, picture: Image.Image | None) -> None:
        preview = ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION) if picture else None
        bar.update_absolute(step + 1, total, preview)

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        show(step, total, previews.after_step(x0, last=step + 1 == total))
        if x0.is_cuda:
            pace.add_step(torch.cuda.current_stream(x0.device).record_event())
        while not pace.caught_up():
            comfy.model_management.throw_exception_if_processing_interrupted()
            sleep(POLL)
            if (picture := previews.ready()) is not None:
                show(step, total, picture)

    return callback


def previews_of_run(patcher: Any, kind: str) -> Previews:
    """Previews of a MODEL's run: by a learned previewer where its file exists, else by ComfyUI's approximation."""
    try:
        method = preview_method()
        if method == LatentPreviewMethod.NoPreviews:
            return Previews(None)
        previewer = learned_previewer(patcher.model, kind) if method in LEARNED else None
        previewer = previewer or approximation(patcher.model.latent_format)
        previewer.network.to(patcher.load_device)
        return Previews(previewer, previewer.side_stream(patcher.load_device))
    except Exception as error:  # previews must not make a run fail
        logging.warning("This run shows no previews: %s", quoted(error))
        return Previews(None)


def preview_method() -> LatentPreviewMethod:
    """The preview method: chosen by the front end for this prompt, or by the server's command line; else `auto`.

    `none` is also ComfyUI's default, and in `args` it looks the same as a `none` that somebody chose.
    """
    server, method = running_server(), LatentPreviewMethod.NoPreviews
    if args.preview_method != method or (comfy.options.args_parsing and states_method(sys.argv[1:])):
        return args.preview_method
    if server is not None and (server.client_id is None or asks_for_none(server)):
        return method  # without a client, previews would go to everybody who is connected
    return LatentPreviewMethod.Auto


def states_method(words: Sequence[str]) -> bool:
    """Whether a command line has --preview-method, or an abbreviation of it that argparse accepts."""
    names = [word.partition("=")[0] for word in words]
    return any(name.startswith("--preview-m") and "--preview-method".startswith(name) for name in names)


def asks_for_none(server: Any) -> bool:
    """Whether the running prompt was queued with `none` by a front end with a setting for it."""
    for _, prompt_id, _, extra_data, *_ in list(server.prompt_queue.currently_running.values()):
        if prompt_id == server.last_prompt_id and isinstance(extra_data, dict):
            return extra_data.get("preview_method") == LatentPreviewMethod.NoPreviews.value
    return False


def approximation(latent_format: Any) -> Previewer:
    """ComfyUI's approximation, by its RGB factors for a family of latents."""
    network = ColourFactors(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    return Previewer(network, 1, latent_preview.MAX_PREVIEW_RESOLUTION)


def learned_previewer(base: Any, kind: str) -> Previewer | None:
    """Learned previewer of a model's own family, loaded once for all runs until the files change.

    Only the demo's Stage B has one: its Stage A, which is fast. The published Stage A is too slow, and ComfyUI's
    approximation fits its latents.
    """
    paths = previewer_files(getattr(base.diffusion_model, "name", ""), kind)
    files = [(path, (status := path.stat()).st_mtime_ns, status.st_size) for path in paths]
    kept_files, previewer = getattr(base, KEPT, (None, None))
    if kept_files != files:
        previewer = load_previewer(paths, kind, base.latent_format.latent_channels)
        setattr(base, KEPT, (files, previewer))  # in a tuple, so that it is not registered as a submodule
    return previewer


def previewer_files(name: str, kind: str) -> list[Path]:
    """Files in which the previewer for a network of that file name may be."""
    role = PREVIEWERS[kind][0]
    demo = roles.demo_file(role)
    if name == roles.DEMO_NAMES[kind]:
        return [demo] if demo else []
    if kind != "stage_c":
        return []
    paths = [folders.find_file(role, name) for name in folders.list_files(role)]
    return [path for path in paths if path != demo]


def load_previewer(paths: Sequence[Path], kind: str, latent_channels: int) -> Previewer | None:
    """The first file that is a complete previewer by its contents."""
    role, channels, stride = PREVIEWERS[kind]
    for path in paths:
        try:
            network, _, config = checkpoints.load_model(path, expect=role, dtype=torch.float32)
        except CascadeError:
            continue
        if config[channels] == latent_channels:
            return Previewer(network, stride, min(LEARNED_SIDE, latent_preview.MAX_PREVIEW_RESOLUTION))
    return None
