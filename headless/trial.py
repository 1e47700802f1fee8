"""A graph that makes a picture with a training's result, and the command that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError
from ..cascade_core.geometry import STAGE_C_COMPRESSION
from ..cascade_core.writing import write_file

if TYPE_CHECKING:
    from ..cascade_core.training.settings import Settings

GRAPH = "try.json"  # in the run's folder


def how_to_try(settings: Settings, file: Path) -> str:
    """A sentence with the command that makes a picture with the file; its graph is written into the run's folder."""
    if settings.task == "controlnet":
        return f"Try it: choose {file.name} in Load Cascade ControlNet (example_workflows/api/controlnet_*.json)."
    try:
        stages = decoding_stages(settings)
    except CascadeError as error:
        return f"To try it, Stage B and Stage A are needed: {error}"
    path = Path(settings.output.folder or ".") / GRAPH
    write_file(path, json.dumps(trial_graph(settings, file, *stages), indent=2) + "\n")
    return f"Try it: cascade run {_shown(path)}"


def decoding_stages(settings: Settings) -> tuple[str, str]:
    """The files of Stage B and Stage A: those for samples, the demo's for the demo, or the published ones.

    Raises CascadeError where they are not found.
    """
    from ..cascade_core.training.settings import DECODERS
    from ..nodes.hosts.headless.folders import find_file, list_files
    from ..nodes.hosts.roles import DEMO_FOLDER, DEMO_NAMES

    models = settings.models
    if models.stage_b is not None and models.stage_a is not None:
        return models.stage_b, models.stage_a
    stages, of_the_demo = [], Path(models.stage_c).parent == DEMO_FOLDER
    for role in ("stage_b", "stage_a"):
        names = (DEMO_NAMES[role],) if of_the_demo else DECODERS[role]
        found = next((name for name in names if name in list_files(role)), names[0])
        stages.append(str(find_file(role, found).resolve()))
    return stages[0], stages[1]


def trial_graph(settings: Settings, file: Path, stage_b: str, stage_a: str) -> dict[str, Any]:
    """A text-to-image graph of the first sample's prompt, with the run's networks and result."""
    from ..cascade_core.training.samples import STAGE_B_CFG, STAGE_B_STEPS

    models, output = settings.models, settings.output
    first: Any = output.prompts[0] if output.prompts else "a photograph"
    prompt, negative = (first, "") if isinstance(first, str) else (first.prompt, first.negative)
    files = {"stage_c": models.stage_c, "stage_b": stage_b, "text_encoder": models.text_encoder}
    if settings.task == "finetune":
        files |= {settings.network: str(file)} | (
            {"text_encoder": str(file)} if settings.text_with_stage_c else {}
        )
    graph = {
        "1": _node("StageCLoader", file=files["stage_c"], dtype="auto"),
        "2": _node("StageBLoader", file=files["stage_b"], dtype="auto"),
        "3": _node("StageAVAE", file=stage_a),
        "4": _node("CascadeTextEncoderLoader", file=files["text_encoder"]),
    }
    model, decoder, clip = ["1", 0], ["2", 0], ["4", 0]
    if settings.task != "finetune":
        changed = decoder if settings.network == "stage_b" else model
        graph["5"] = _node(
            "CascadeLoRAApply",
            model=changed,
            clip=clip,
            file=str(file),
            strength_model=1.0,
            strength_clip=1.0,
        )
        model, decoder = (model, ["5", 0]) if settings.network == "stage_b" else (["5", 0], decoder)
        clip = ["5", 1]
    side = settings.data.size // 8 * 8
    sampling = {"seed": 7, "cfg_rescale": 0.7, "denoise": 1.0}
    return {
        **graph,
        "6": _node("CascadeTextEncode", clip=clip, positive=prompt, negative=negative),
        "7": _node(
            "CascadeEmptyLatent", width=side, height=side, batch_size=1, compression=STAGE_C_COMPRESSION
        ),
        "8": _node(
            "CascadePriorSampler",
            model=model,
            positive=["6", 0],
            negative=["6", 1],
            latent=["7", 0],
            steps=output.sample_steps,
            cfg=output.sample_cfg,
            shift=output.sample_shift,
            sampler=output.sample_sampler,
            **sampling,
        ),
        "9": _node(
            "CascadeDecoderSampler",
            model=decoder,
            positive=["6", 0],
            negative=["6", 1],
            stage_c=["8", 0],
            latent=["7", 1],
            steps=STAGE_B_STEPS,
            cfg=STAGE_B_CFG,
            shift=1.0,
            sampler="ddpm",
            tile_size=0,
            **sampling,
        ),
        "10": _node("CascadeDecode", vae=["3", 0], samples=["9", 0], tile_size=0),
        "11": _node("SaveImage", images=["10", 0], filename_prefix=file.stem),
    }


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _shown(path: Path) -> str:
    """The path, relative to the current folder if it lies inside, quoted if a shell needs it."""
    import shlex

    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
