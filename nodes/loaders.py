"""Loaders: a file becomes a MODEL, VAE, CLIP, CLIP_VISION or CONTROL_NET of the host."""

from pathlib import Path
from typing import Any

from ..cascade_core.checkpoints import PART_NAMES, networks_in
from ..cascade_core.errors import CascadeError
from .api import io
from .hosts import host
from .hosts.roles import DEMO_NAMES, DTYPES, ROLE_WORDS

CATEGORY = "Stable Cascade/loaders"
NO_FILE = "none"

DTYPE_TOOLTIP = (
    "Precision of the weights. auto: what the device computes fastest in (float32 on the CPU). fp8 halves "
    "the memory "
    "of bf16 and needs ComfyUI."
)


def file_input(input_id: str, role: str, tooltip: str, optional_file: bool = False) -> Any:
    """A combo of the files that the host finds for a role, listed anew each time the schema is asked for."""
    names = ([NO_FILE] if optional_file else []) + host().list_files(role)
    default = DEMO_NAMES.get(role) if DEMO_NAMES.get(role) in names else None
    return io.Combo.Input(input_id, options=names, default=default, tooltip=tooltip)


def find(role: str, name: str) -> Path:
    """The file behind a combo's value.

    Values are checked here and not against the list: 0.3.64 does not check V3 combos, and the embedded host
    also takes paths.
    """
    if not isinstance(name, str) or not name:
        raise CascadeError(f"No {ROLE_WORDS[role]} file is chosen; choose one in the loader.")
    return host().find_file(role, name)


def check(role: str, name: str | None) -> bool | str:
    """True, or what is wrong with the value, for `validate_inputs`. None: it comes over a link, and later."""
    if name is None:
        return True
    try:
        find(role, name)
    except CascadeError as error:
        return str(error)
    return True


def fingerprint(role: str, name: str) -> str:
    """Changes when the file does, so that a replaced file is loaded anew."""
    try:
        path = find(role, name)
    except CascadeError:
        return f"{name}: missing"
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return f"{path}: " + " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


class StageCLoader(io.ComfyNode):
    """A Stage C file as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageCLoader",
            display_name="Load Stage C",
            category=CATEGORY,
            description="Loads Stage C, the network that turns a prompt into a small semantic latent.",
            inputs=[
                file_input("file", "stage_c", "Stage C checkpoint (3.6 B or 1.0 B), a safetensors file."),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto", tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Stage C, for Cascade Prior Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("stage_c", file)

    @classmethod
    def fingerprint_inputs(cls, file, dtype) -> str:
        return fingerprint("stage_c", file)

    @classmethod
    def execute(cls, file, dtype) -> io.NodeOutput:
        return io.NodeOutput(host().load_network("stage_c", find("stage_c", file), dtype))


class StageBLoader(io.ComfyNode):
    """A Stage B file as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageBLoader",
            display_name="Load Stage B",
            category=CATEGORY,
            description=(
                "Loads Stage B, the network that unfolds Stage C's latent into the picture's own latent."
            ),
            inputs=[
                file_input("file", "stage_b", "Stage B checkpoint (1.5 B or 0.7 B), a safetensors file."),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto", tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Stage B, for Cascade Decoder Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("stage_b", file)

    @classmethod
    def fingerprint_inputs(cls, file, dtype) -> str:
        return fingerprint("stage_b", file)

    @classmethod
    def execute(cls, file, dtype) -> io.NodeOutput:
        return io.NodeOutput(host().load_network("stage_b", find("stage_b", file), dtype))


class StageAVAE(io.ComfyNode):
    """A Stage A file as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageAVAE",
            display_name="Load Stage A VAE",
            category=CATEGORY,
            description="Loads Stage A, which turns Stage B's latent into the picture and back.",
            inputs=[file_input("file", "stage_a", "Stage A checkpoint (stage_a.safetensors).")],
            outputs=[io.Vae.Output(display_name="VAE", tooltip="For Cascade Decode, and any VAE node.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("stage_a", file)

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint("stage_a", file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(host().load_stage_a(find("stage_a", file)))


class CascadeCompressorLoader(io.ComfyNode):
    """The semantic compressor, with the previewer as its decoder, as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeCompressorLoader",
            display_name="Load Cascade Compressor",
            category=CATEGORY,
            description=(
                "Loads the semantic compressor, which turns a picture into a Stage C latent, and the "
                "previewer, "
                "which shows one."
            ),
            inputs=[
                file_input(
                    "file", "compressor", "Semantic compressor (effnet_encoder.safetensors): encodes."
                ),
                file_input(
                    "previewer",
                    "previewer",
                    "Previewer (previewer.safetensors): decodes Stage C latents to small pictures. none: "
                    "encode only.",
                    optional_file=True,
                ),
            ],
            outputs=[
                io.Vae.Output(display_name="VAE", tooltip="For Cascade Encode, and to view Stage C latents.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None, previewer=None) -> bool | str:
        found = check("compressor", file)
        return found if found is not True or previewer == NO_FILE else check("previewer", previewer)

    @classmethod
    def fingerprint_inputs(cls, file, previewer) -> str:
        return f"{fingerprint('compressor', file)} {fingerprint('previewer', previewer)}"

    @classmethod
    def execute(cls, file, previewer) -> io.NodeOutput:
        decoder = None if previewer == NO_FILE else find("previewer", previewer)
        return io.NodeOutput(host().load_compressor(find("compressor", file), decoder))


class CascadeTextEncoderLoader(io.ComfyNode):
    """A CLIP text encoder, from a file or a folder, as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTextEncoderLoader",
            display_name="Load Cascade Text Encoder",
            category=CATEGORY,
            description="Loads the text encoder (CLIP ViT-bigG/14 for the published networks).",
            inputs=[
                file_input(
                    "file",
                    "text_encoder",
                    "Text encoder: a safetensors file (CLIP's own vocabulary), or a folder with its "
                    "vocabulary.",
                )
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="For Cascade Text Encode, and any CLIP node.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("text_encoder", file)

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint("text_encoder", file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(host().load_text_encoder(find("text_encoder", file)))


class CascadeVisionLoader(io.ComfyNode):
    """A CLIP image encoder as CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeVisionLoader",
            display_name="Load Cascade Image Encoder",
            category=CATEGORY,
            description=(
                "Loads the image encoder (CLIP ViT-L/14 for the published networks) for image prompts."
            ),
            inputs=[file_input("file", "vision", "Image encoder: a safetensors file.")],
            outputs=[io.ClipVision.Output(display_name="CLIP_VISION", tooltip="For Cascade Image Prompt.")],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("vision", file)

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint("vision", file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(host().load_vision(find("vision", file)))


class CascadeControlNetLoader(io.ComfyNode):
    """A Stable Cascade ControlNet file as CONTROL_NET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeControlNetLoader",
            display_name="Load Cascade ControlNet",
            category=CATEGORY,
            description=(
                "Loads a Stable Cascade ControlNet of any kind and size: canny, inpainting, super resolution, "
                "identity."
            ),
            inputs=[file_input("file", "controlnet", "ControlNet checkpoint, a safetensors file.")],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET", tooltip="For ComfyUI's Apply ControlNet, with Stage C."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("controlnet", file)

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint("controlnet", file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(host().load_controlnet(find("controlnet", file)))


class CascadeCheckpointLoader(io.ComfyNode):
    """All that one file or folder holds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeCheckpointLoader",
            display_name="Load Cascade Checkpoint",
            category=CATEGORY,
            description=(
                "Loads an all-in-one checkpoint, or a diffusers folder: Stage C or B with what else it holds."
            ),
            inputs=[
                file_input("file", "checkpoint", "All-in-one checkpoint, or a folder with model_index.json."),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto", tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="Stage C, or Stage B where it holds no Stage C."
                ),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder."),
                io.Vae.Output(
                    display_name="VAE",
                    tooltip="Stage A, or the compressor with the previewer beside Stage C.",
                ),
                io.ClipVision.Output(display_name="CLIP_VISION", tooltip="The image encoder."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("checkpoint", file)

    @classmethod
    def fingerprint_inputs(cls, file, dtype) -> str:
        return fingerprint("checkpoint", file)

    @classmethod
    def execute(cls, file, dtype) -> io.NodeOutput:
        path = find("checkpoint", file)
        parts = networks_in(path)
        kind = next((kind for kind in ("stage_c", "stage_b") if kind in parts), None)
        if kind is None:
            found = ", ".join(sorted(PART_NAMES[part] for part in parts)) or "nothing of Stable Cascade"
            raise CascadeError(
                f"{path.name} holds {found}, but an all-in-one checkpoint with Stage C or B is expected; choose one, "
                "or the loader of what it holds."
            )
        vae = None
        if "stage_a" in parts:
            vae = host().load_stage_a(path)
        elif "compressor" in parts:
            vae = host().load_compressor(path, path if "previewer" in parts else None)
        return io.NodeOutput(
            host().load_network(kind, path, dtype),
            host().load_text_encoder(path) if "text" in parts else None,
            vae,
            host().load_vision(path) if "vision" in parts else None,
        )
