"""Loaders of files as MODEL, VAE, CLIP, CLIP_VISION or CONTROL_NET of the host."""

from ..cascade_core.checkpoints import PART_NAMES, networks_in
from ..cascade_core.errors import CascadeError
from .api import io, searched_as
from .files import NO_FILE, check, file_input, find, fingerprint
from .hosts import host
from .hosts.roles import DTYPES

CATEGORY = "Stable Cascade/loaders"

DTYPE_TOOLTIP = (
    "Precision of the weights. auto: what the device computes fastest in (float32 on the CPU). fp8 and int8 "
    "halve the memory of bf16 for a little accuracy, of which int8 costs less. From compute capability 8.9 on "
    "(RTX 40 series) fp8 is faster too; elsewhere both are slower."
)


class StageCLoader(io.ComfyNode):
    """Loads a Stage C file as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageCLoader",
            display_name="Load Stage C",
            category=CATEGORY,
            description="Loads Stage C, the network that turns a prompt into a small semantic latent.",
            **searched_as("stable cascade, wuerstchen, würstchen, prior, load diffusion model, unet loader"),
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
    """Loads a Stage B file as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageBLoader",
            display_name="Load Stage B",
            category=CATEGORY,
            description=(
                "Loads Stage B, the network that unfolds Stage C's latent into the picture's own latent."
            ),
            **searched_as(
                "stable cascade, wuerstchen, würstchen, decoder, load diffusion model, unet loader"
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
    """Loads a Stage A file as VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageAVAE",
            display_name="Load Stage A VAE",
            category=CATEGORY,
            description="Loads Stage A, which turns Stage B's latent into the picture and back.",
            **searched_as("stable cascade, wuerstchen, load vae, vae loader, vqgan"),
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
    """Loads the semantic compressor, with the previewer as its decoder, as VAE."""

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
            **searched_as("stable cascade, img2img, image to image, effnet, previewer"),
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
        verdict = check("compressor", file)
        return verdict if verdict is not True or previewer == NO_FILE else check("previewer", previewer)

    @classmethod
    def fingerprint_inputs(cls, file, previewer) -> str:
        return f"{fingerprint('compressor', file)} {fingerprint('previewer', previewer)}"

    @classmethod
    def execute(cls, file, previewer) -> io.NodeOutput:
        decoder = None if previewer == NO_FILE else find("previewer", previewer)
        return io.NodeOutput(host().load_compressor(find("compressor", file), decoder))


class CascadeTextEncoderLoader(io.ComfyNode):
    """Loads a CLIP text encoder, from a file or a folder, as CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTextEncoderLoader",
            display_name="Load Cascade Text Encoder",
            category=CATEGORY,
            description="Loads the text encoder (CLIP ViT-bigG/14 for the published networks).",
            **searched_as("stable cascade, load clip, clip loader"),
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
    """Loads a CLIP image encoder as CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeVisionLoader",
            display_name="Load Cascade Image Encoder",
            category=CATEGORY,
            description=(
                "Loads the image encoder (CLIP ViT-L/14 for the published networks) for image prompts."
            ),
            **searched_as("stable cascade, clip vision, load clip vision, unclip, image variation"),
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
    """Loads a Stable Cascade ControlNet file as CONTROL_NET."""

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
            **searched_as("stable cascade, load controlnet model"),
            inputs=[file_input("file", "controlnet", "ControlNet checkpoint, a safetensors file.")],
            outputs=[
                io.ControlNet.Output(
                    display_name="CONTROL_NET", tooltip="For Cascade ControlNet Apply, or ComfyUI's own."
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
    """Loads all networks of one file or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeCheckpointLoader",
            display_name="Load Cascade Checkpoint",
            category=CATEGORY,
            description=(
                "Loads an all-in-one checkpoint, or a diffusers folder: Stage C or B, and the other networks in it."
            ),
            **searched_as("stable cascade, wuerstchen, load checkpoint, diffusers"),
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
                    tooltip="Stage A, or, where it holds Stage C, the compressor with the previewer.",
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
        networks = networks_in(path)
        kind = next((kind for kind in ("stage_c", "stage_b") if kind in networks), None)
        if kind is None:
            contents = ", ".join(sorted(PART_NAMES[part] for part in networks)) or "nothing of Stable Cascade"
            raise CascadeError(
                f"{path.name} holds {contents}, but an all-in-one checkpoint with Stage C or B is expected; choose "
                "one, or the loader of what it holds."
            )
        vae = None
        if "stage_a" in networks:
            vae = host().load_stage_a(path)
        elif "compressor" in networks:
            vae = host().load_compressor(path, path if "previewer" in networks else None)
        return io.NodeOutput(
            host().load_network(kind, path, dtype),
            host().load_text_encoder(path) if "text" in networks else None,
            vae,
            host().load_vision(path) if "vision" in networks else None,
        )
