"""Node for LoRAs, and for tokens learned with them or by themselves."""

from collections.abc import Sequence
from typing import Any

from ..cascade_core import limits
from ..cascade_core.adapters import (
    Adapter,
    check_finite_changes,
    check_fits,
    describe_file,
    describe_notes,
    read_adapter,
)
from ..cascade_core.adapters.text_changes import check_text_changes
from ..cascade_core.adapters.tokens import NewToken, parse_new_tokens
from ..cascade_core.networks.config import StageCConfig
from .api import io, searched_as
from .files import check, file_input, find, fingerprint
from .hosts import host
from .sockets import check_connected, check_network

CATEGORY = "Stable Cascade/LoRA"


def strength_input(input_id: str, tooltip: str) -> Any:
    """Input for the strength of a LoRA."""
    return io.Float.Input(input_id, default=1.0, **limits.STRENGTH.input(), step=0.01, tooltip=tooltip)


class CascadeLoRAApply(io.ComfyNode):
    """Applies a LoRA to Stage C or B and the text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeLoRAApply",
            display_name="Cascade LoRA Apply",
            category=CATEGORY,
            description=(
                "Applies a LoRA, whatever program trained it, to Stage C, Stage B and the text encoder. A token that "
                "its file teaches is written as [name] in the prompt. Several of these in a row work together."
            ),
            **searched_as("stable cascade, load lora, lora loader, textual inversion, embedding, token"),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "Stage C, from Load Stage C or another of these nodes; Stage B for a LoRA of Stage B."
                    ),
                ),
                file_input(
                    "file",
                    "lora",
                    "A LoRA of the official code, kohya, OneTrainer, diffusers, PEFT or ComfyUI, or an embedding.",
                ),
                strength_input(
                    "strength_model",
                    "How much the MODEL is changed: 0 not at all, 1 as trained, below 0 the opposite way.",
                ),
                strength_input(
                    "strength_clip",
                    "The same for the text encoder. 0 also leaves out the tokens that the file teaches.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for LoRAs that change it and files that teach tokens.",
                ),
                io.String.Input(
                    "new_tokens",
                    default="",
                    optional=True,
                    tooltip=(
                        "Only for official LoRAs with new tokens, whose names are not in the file: the name "
                        "and pattern of each from the training's train_tokens, such as [fernando] ^dog</w>, "
                        "separated by ;."
                    ),
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    **limits.ALPHA.input(),
                    step=0.5,
                    optional=True,
                    tooltip=(
                        "Only for files that do not say which alpha they were trained with, such as PEFT's "
                        "without adapter_config.json. 0: as the file says, else each layer's rank."
                    ),
                ),
                io.String.Input(
                    "module_filters",
                    default="",
                    optional=True,
                    tooltip=(
                        "Only for official LoRAs that could belong to several kinds of layers: the "
                        "training's module_filters, such as .attn, kv_mapper."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip=(
                        "Stage C with the LoRA, for Cascade Prior Sampler; Stage B for Cascade Decoder Sampler."
                    ),
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The text encoder with the LoRA and its tokens, for Cascade Text Encode.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None) -> bool | str:
        return check("lora", file)

    @classmethod
    def fingerprint_inputs(cls, file, **others) -> str:
        return fingerprint("lora", file)

    @classmethod
    def execute(
        cls,
        model,
        file,
        strength_model,
        strength_clip,
        clip=None,
        new_tokens="",
        alpha=0.0,
        module_filters="",
    ) -> io.NodeOutput:
        kind = _kind_of(model)
        check_connected(clip, "The CLIP of Cascade LoRA Apply", "Load Cascade Text Encoder")
        if strength_model == 0 and strength_clip == 0:
            return io.NodeOutput(model, clip)
        config = host().stage_config(model)
        stage_c = config if isinstance(config, StageCConfig) else None
        adapter = read_adapter(find("lora", file), stage_c, alpha, module_filters)
        new = parse_new_tokens(new_tokens)
        if strength_model:
            check_fits(adapter, config, kind)
            check_finite_changes(adapter.diffusion, adapter.name)
        text_notes = _text_notes(adapter, clip, new) if strength_clip else []
        patched = host().with_adapter(model, clip, adapter, strength_model, strength_clip, new)
        if notes := [*describe_notes(adapter), *text_notes]:
            host().notify(" ".join(notes), in_panel=True)
        return io.NodeOutput(*patched, ui={"text": [*describe_file(adapter), *text_notes]})


def _kind_of(model: Any) -> str:
    """The kind of a MODEL: stage_b or stage_c. Raises CascadeError for any other."""
    connected = model is not None and not isinstance(model, str | int | float | list | dict)
    if connected and host().describe_network(model).kind == "stage_b":
        return "stage_b"
    check_network(model, "stage_c", "Cascade LoRA Apply", "Load Stage C")
    return "stage_c"


def _text_notes(adapter: Adapter, clip: Any, new: Sequence[NewToken]) -> list[str]:
    """Checks an adapter's part for the text encoder, and returns notes about it for the user."""
    if clip is None:
        unused = bool(adapter.text or adapter.tokens)
        return (
            [f"{adapter.name} also changes the text encoder; connect clip so that it does."] if unused else []
        )
    return check_text_changes(adapter, host().text_network(clip), new)
