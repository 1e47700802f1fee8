"""What is shown while sampling: the picture of a learned previewer where there is one, else ComfyUI's approximation;
when it is shown, how often, and that the latent is the same whatever is shown.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import comfy.options
import comfy.utils
import folder_paths
import latent_preview
import native
import torch
from comfy.cli_args import LatentPreviewMethod, args
from interop import RunToZero, encode, make_run
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.hosts import comfyui, previews
from cascade_nodes.nodes.hosts.comfyui import progress

STEPS = 3
NONE, AUTO, RGB = (
    LatentPreviewMethod.NoPreviews,
    LatentPreviewMethod.Auto,
    LatentPreviewMethod.Latent2RGB,
)


def file_of(role: str) -> Path:
    return WEIGHTS / f"demo_{role}.safetensors"


@dataclass
class Shown:
    """What a run shows, and the latent that comes of it."""

    previews: list[Image.Image] = field(default_factory=list)
    latent: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def show(request: Any, method: LatentPreviewMethod = AUTO, now: Callable[[], float] | None = None) -> Shown:
    """A run with a bar. now: the clock by which previews are due; None: they are at each step."""
    shown = Shown()

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        if preview:
            shown.previews.append(preview[1])

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with (
            patch.object(args, "preview_method", method),
            patch.object(comfy.options, "args_parsing", method == NONE),
            patch("sys.argv", ["main.py", "--preview-method", "none"]),
            patch.object(previews, "monotonic", now)
            if now
            else patch.multiple(previews, INTERVAL=0, PAUSE=0),
        ):
            shown.latent = comfyui.sample(request).latent
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    return shown


def difference(preview: Image.Image, picture: torch.Tensor) -> float:
    """Largest difference, of 255, between the last step's preview and the result's picture.

    The preview shows the step's clean latent, which is the result of a `RunToZero`.
    """
    return (pil_to_tensor(preview) - picture[0].clamp(0, 1) * 255).abs().max().item()


def by_comfyui(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """ComfyUI's own approximation of a LATENT."""
    latent_format = model.model.latent_format
    factors = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    previewer = latent_preview.Latent2RGBPreviewer(*factors)
    picture = previewer.decode_latent_to_preview(latent_format.process_in(latent))
    return pil_to_tensor(picture)[None] / 255


def learned(requests: dict[str, Any]) -> dict[str, Any]:
    """The demo's runs, by its own networks; without them."""
    networks = {
        name: checkpoints.load_model(file_of(name), dtype=torch.float32)[0]
        for name in ("previewer", "stage_a")
    }
    pictures: dict[str, Any] = {"stage_c": networks["previewer"], "stage_b": networks["stage_a"].decode}
    results: dict[str, Any] = {}
    for kind, picture in pictures.items():
        shown, latent_rgb = show(requests[kind]), show(requests[kind], RGB)
        units = 0.43 if kind == "stage_b" else 1.0
        results[f"{kind}, learned"] = difference(shown.previews[-1], picture(shown.latent / units))
        results[f"{kind}, previews"] = len(shown.previews)
        theirs = by_comfyui(requests[kind].model, latent_rgb.latent)
        results[f"{kind}, approximation"] = difference(latent_rgb.previews[-1], theirs)
    return results


def from_files(prompts: Any) -> dict[str, Any]:
    """A Stage C that is not the demo's, with files of previewers that come, change and go; how often one is read."""
    network = checkpoints.load_model(file_of("previewer"), dtype=torch.float32)[0]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vae").mkdir()
        wide = comfyui.load_network("stage_c", native.wide_stage_c(folder), "fp32")
        request, load = make_run("stage_c", wide, prompts, RunToZero, steps=STEPS), checkpoints.load_model
        results["without a file"] = list(show(request).previews[-1].size)
        folder_paths.add_model_folder_path("vae", str(folder / "vae"))
        (folder / "vae" / "a_broken.safetensors").write_bytes(b"broken")
        file = folder / "vae" / "any_name.safetensors"
        shutil.copy(file_of("previewer"), file)
        with patch.object(checkpoints, "load_model", Mock(side_effect=load)) as reading:
            shown = [show(request) for _ in range(3)][-1]
            results["files read in three runs"] = reading.call_count
            os.utime(file, (1, 1))
            show(request)
            results["files read when one has changed"] = reading.call_count
        results["with a file"] = list(shown.previews[-1].size)
        results["with a file, learned"] = difference(shown.previews[-1], network(shown.latent))
        file.unlink()
        os.utime(folder / "vae", (1, 1))  # so that ComfyUI lists it again
        results["when it is gone"] = list(show(request).previews[-1].size)
        results["in the model's weights"] = [key for key in wide.model.state_dict() if "preview" in key]
    return results


def of_two(request: Any) -> Any:
    """The run for two pictures, with a mask."""
    latent = torch.cat([request.run.latent] * 2)
    mask = torch.zeros(1, *latent.shape[-2:])
    mask[:, latent.shape[-2] // 2 :] = 1
    return replace(request, run=replace(request.run, latent=latent, mask=mask, denoise=0.7))


def same_latents(requests: dict[str, Any]) -> dict[str, Any]:
    """Whether each run gives the same bits with previews and without, and draws no random numbers for them."""
    cases = {
        **requests,
        **{f"{kind}, two and a mask": of_two(request) for kind, request in requests.items()},
        **{
            f"{kind}, ddpm": replace(request, run=replace(request.run, sampler="ddpm"))
            for kind, request in requests.items()
        },
        "stage_b, tiles": replace(requests["stage_b"], tile_positions=16),
    }
    results = {}
    for name, request in cases.items():
        state = torch.get_rng_state()
        without, *others = (show(request, method) for method in (NONE, AUTO, RGB))
        same = all(torch.equal(without.latent, shown.latent) for shown in others)
        drew_none = torch.equal(state, torch.get_rng_state())
        results[name] = same and drew_none, [len(shown.previews) for shown in (without, *others)]
    return results


def times(request: Any) -> dict[str, list[float]]:
    """Start times of the previews in 20 steps, on a simulated clock that steps and previews advance."""
    request = replace(request, run=replace(request.run, steps=20))
    picture, after_step = previews.Previewer.picture, previews.Previews.after_step
    results = {}
    for step, preview in ((0.1, 0.0), (0.1, 0.04), (2.0, 0.04)):
        now, begun = [0.0], []

        def take_a_step(*arguments: Any, now: list[float] = now, step: float = step, **options: Any) -> Any:
            now[0] += step
            return after_step(*arguments, **options)

        def take_a_picture(
            *arguments: Any, now: list[float] = now, begun: list[float] = begun, preview: float = preview
        ) -> Any:
            begun.append(round(now[0], 2))
            now[0] += preview
            return picture(*arguments)

        with (
            patch.object(previews.Previews, "after_step", take_a_step),
            patch.object(previews.Previewer, "picture", take_a_picture),
        ):
            show(request, now=lambda now=now: now[0])
        results[f"steps of {step} s, previews of {preview} s"] = begun
    return results


def failing(request: Any) -> dict[str, Any]:
    """A previewer that fails, and one that cannot be made: [same latent, previews, how often it was tried]."""
    right = show(request, NONE)
    results: dict[str, Any] = {}
    for name, place, function in (
        ("as it shows", previews.Previewer, "picture"),
        ("as it is made", progress, "learned_previewer"),
    ):
        failure = Mock(side_effect=torch.OutOfMemoryError("by the test"))
        with patch.object(place, function, failure):
            shown = show(request)
        same = torch.equal(shown.latent, right.latent)
        results[name] = [same, len(shown.previews), failure.call_count]
    with patch.object(previews.Previewer, "picture", Mock()) as picture:
        comfyui.sample(request)
    results["computed where nobody looks"] = picture.call_count
    return results


@contextmanager
def started_with(words: list[str]) -> Iterator[None]:
    """ComfyUI's main.py with these words."""
    with patch.object(comfy.options, "args_parsing", True), patch("sys.argv", ["main.py", *words]):
        yield


def server(client: str | None, extra_data: Any) -> Any:
    """A server in the middle of a prompt, with another one that it has left behind."""
    running = {3: (0, "before", {}, {"preview_method": "none"}, []), 4: (1, "now", {}, extra_data, [], {})}
    return SimpleNamespace(
        client_id=client, last_prompt_id="now", prompt_queue=SimpleNamespace(currently_running=running)
    )


def methods() -> dict[str, str]:
    """The method by what ComfyUI holds in `args`, the words that it was started with, and its prompt."""
    auto, none = ["--preview-method", "auto"], ["--preview-method", "none"]
    cases: dict[str, tuple[LatentPreviewMethod, list[str] | None, Any]] = {
        "nothing": (NONE, [], server("tab", {})),
        "other words": (NONE, ["--preview-size", "512", "none"], server("tab", {})),
        "no server": (NONE, None, None),
        "none": (NONE, none, server("tab", {})),
        "=none": (NONE, ["--preview-method=none"], server("tab", {})),
        "shortened": (NONE, ["--cpu", "--preview-m", "none"], server("tab", {})),
        "none, and auto for the prompt": (AUTO, none, server("tab", {"preview_method": "auto"})),
        "auto": (AUTO, auto, server("tab", {})),
        "auto, and none for the prompt": (NONE, auto, server("tab", {"preview_method": "none"})),
        "none for the prompt": (NONE, [], server("tab", {"preview_method": "none"})),
        "default for the prompt": (NONE, [], server("tab", {"preview_method": "default"})),
        "latent2rgb for the prompt": (RGB, [], server("tab", {"preview_method": "latent2rgb"})),
        "no words for the prompt": (NONE, [], server("tab", ["preview_method"])),
        "nobody's prompt": (NONE, [], server(None, {})),
        "nobody's prompt, auto": (AUTO, auto, server(None, {})),
    }
    results = {}
    for name, (method, words, running) in cases.items():
        with (
            started_with(words) if words is not None else nullcontext(),
            patch.object(args, "preview_method", method),
            patch.object(progress, "running_server", lambda running=running: running),
        ):
            results[name] = progress.preview_method().value
    return results


def measure() -> dict[str, Any]:
    prompts = encode("ours", comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder"))
    requests = {
        kind: make_run(
            kind, comfyui.load_network(kind, file_of(kind), "fp32"), prompts, RunToZero, steps=STEPS
        )
        for kind in ("stage_c", "stage_b")
    }
    return {
        **learned(requests),
        **from_files(prompts),
        "same": same_latents(requests),
        "times": times(requests["stage_c"]),
        "failing": failing(requests["stage_c"]),
        "methods": methods(),
    }
