"""ComfyUI's loaders, for files of Stable Cascade."""

from __future__ import annotations

from typing import Any

from ...cascade_core.checkpoints import networks_in
from ...cascade_core.errors import CascadeError, quoted
from ...nodes.api import io
from ...nodes.files import check, file_input, find, fingerprint
from ...nodes.hosts import host
from ...nodes.loaders import CascadeCheckpointLoader
from .elsewhere import ELSEWHERE

CATEGORY = "loaders"


def _checkpoint_input() -> Any:
    return file_input(
        "ckpt_name", "checkpoint", "A checkpoint with Stage C or B, such as the published ones."
    )


def _check_checkpoint(name: str | None) -> bool | str:
    """Whether a checkpoint exists and is of Stable Cascade; checked before the work, by tensors' names alone."""
    verdict = check("checkpoint", name)
    if verdict is not True or name is None:
        return verdict
    try:
        networks = networks_in(find("checkpoint", name))
    except CascadeError as error:
        return str(error)
    if networks & {"stage_c", "stage_b"}:
        return True
    return f"{quoted(name)} holds neither Stage C nor Stage B of Stable Cascade; {ELSEWHERE}."


def _load(name: str) -> tuple[Any, ...]:
    """Returns (MODEL, CLIP, VAE, CLIP_VISION) of a checkpoint."""
    return CascadeCheckpointLoader.execute(name, "auto").result or ()


class _CheckpointLoader(io.ComfyNode):
    """Checks of a checkpoint before it is loaded."""

    @classmethod
    def validate_inputs(cls, ckpt_name=None) -> bool | str:
        return _check_checkpoint(ckpt_name)

    @classmethod
    def fingerprint_inputs(cls, ckpt_name) -> str:
        return fingerprint("checkpoint", ckpt_name)


class CheckpointLoaderSimple(_CheckpointLoader):
    """Loads MODEL, CLIP and VAE of one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CheckpointLoaderSimple",
            display_name="Load Checkpoint",
            category=CATEGORY,
            description="Loads a checkpoint of Stable Cascade: Stage C or B with what else it holds.",
            inputs=[_checkpoint_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        return io.NodeOutput(*_load(ckpt_name)[:3])


class UnCLIPCheckpointLoader(_CheckpointLoader):
    """Loads MODEL, CLIP, VAE and CLIP_VISION of one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="unCLIPCheckpointLoader",
            display_name="unCLIPCheckpointLoader",
            category=CATEGORY,
            description="Loads a checkpoint of Stable Cascade with its image encoder.",
            inputs=[_checkpoint_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        return io.NodeOutput(*_load(ckpt_name))


class ControlNetLoader(io.ComfyNode):
    """Loads a ControlNet of Stable Cascade."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNetLoader",
            display_name="Load ControlNet Model",
            category=CATEGORY,
            description="Loads a ControlNet of Stable Cascade.",
            inputs=[
                file_input("control_net_name", "controlnet", "ControlNet checkpoint, a safetensors file.")
            ],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def validate_inputs(cls, control_net_name=None) -> bool | str:
        return check("controlnet", control_net_name)

    @classmethod
    def fingerprint_inputs(cls, control_net_name) -> str:
        return fingerprint("controlnet", control_net_name)

    @classmethod
    def execute(cls, control_net_name) -> io.NodeOutput:
        return io.NodeOutput(host().load_controlnet(find("controlnet", control_net_name)))
