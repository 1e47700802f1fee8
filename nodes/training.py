"""Training from a graph: a LoRA, a ControlNet or tokens, by the same runs as `cascade train`."""

from pathlib import Path
from typing import Any

from ..cascade_core.errors import CascadeError
from ..cascade_core.hints.kinds import KINDS
from .api import io
from .files import check, file_input, find, stamp
from .hosts import host
from .hosts.roles import leaves_folder

CATEGORY = "Stable Cascade/training"
SUFFIX = ".safetensors"
MODELS = ("stage_c", "text_encoder", "compressor")


def common_inputs(kind: str) -> list[Any]:
    """The inputs of every kind of training."""
    return [
        io.String.Input(
            "name",
            default=f"my_{kind}",
            tooltip="Name of the new file in the models folder, without its ending.",
        ),
        io.String.Input(
            "pictures",
            default="pictures",
            tooltip=(
                "A folder of pictures with captions, in the input folder or by path. star.png is described by "
                "star.txt, one caption a line."
            ),
        ),
        file_input("stage_c", "stage_c", "The Stage C that is trained for; its own file stays as it is."),
        file_input("text_encoder", "text_encoder", "The text encoder that reads the captions."),
        file_input(
            "compressor", "compressor", "The semantic compressor, which turns the pictures into latents."
        ),
        io.Int.Input(
            "size",
            default=1024,
            min=64,
            max=4096,
            step=64,
            tooltip=(
                "Pixels: pictures are brought to about size × size, in their own aspect ratio. Best the size that "
                "Stage C was trained at (1024); smaller is faster."
            ),
        ),
        io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Steps of training."),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=4096,
            tooltip="How many pictures each step learns from. More need more memory.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=1e-8,
            tooltip="How far each step goes: 1e-4 is usual, 1e-3 for tokens.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            # The interface lets a seed change after each run by itself, and a run that is cancelled could not go on.
            control_after_generate=False,
            tooltip="Decides what is random: the same seed trains the same file again.",
        ),
    ]


def settings_input() -> Any:
    return io.String.Input(
        "settings",
        default="",
        multiline=True,
        optional=True,
        tooltip=(
            "Further settings of `cascade train`, in YAML; the help page shows some. They count before the inputs "
            "above."
        ),
    )


def file_output(kind: str, node: str) -> list[Any]:
    """The name of what was trained. node: the one that lists it."""
    return [
        io.String.Output(display_name="file", tooltip=f"The name of the {kind}'s file, to choose in {node}.")
    ]


def train_file(task: Any, role: str, inputs: dict[str, Any], sections: dict[str, Any]) -> io.NodeOutput:
    """Train, or resume where the run was interrupted; returns the file's name. sections: the task's own settings."""
    from ..cascade_core.training.run import interrupted, train
    from ..cascade_core.training.settings import resolve, settings_of

    name = checked_name(inputs["name"])
    run = host().run_folder(f"{task}_{Path(name).stem}")
    values: dict[str, Any] = {
        "models": {model: inputs[model] for model in MODELS},
        "data": {"folder": str(host().picture_folder(inputs["pictures"]).resolve()), "size": inputs["size"]},
        "train": {key: inputs[key] for key in ("steps", "batch_size", "learning_rate", "seed")},
        "output": {"file": str(host().new_file(role, name).resolve()), "folder": str(run)},
        **sections,
    }
    for section, more in checked_settings(inputs.get("settings", "")).items():
        mixed = isinstance(more, dict) and isinstance(values.get(section), dict)
        values[section] = {**values[section], **more} if mixed else more
    resolved = resolve(settings_of(values, task, "settings"), Path.cwd(), find)
    with host().training() as (report, stop):
        train(
            resolved,
            host().notify,
            lambda progress: report(progress.step, progress.steps),
            report,
            stop,
            fresh=not interrupted(resolved),
        )
    return io.NodeOutput(name)


# What the host decides: a graph from elsewhere must not write where it likes.
_FIXED = (("output", "file"), ("output", "folder"), ("data", "folder"), ("data", "cache"))


def checked_settings(text: str) -> dict[str, Any]:
    """Read the settings' sections. Raises CascadeError for keys that other inputs decide."""
    from ..cascade_core.training.typed_yaml import parse_yaml

    values = parse_yaml(text, "settings")
    for section, key in _FIXED:
        if isinstance(values.get(section), dict) and key in values[section]:
            raise CascadeError(f"settings: {section}.{key} is decided by the node's other inputs; remove it.")
    return values


def checked_name(name: str) -> str:
    """The name with its suffix. Raises CascadeError for one that would leave the folder."""
    if leaves_folder(name) or not Path(name).name.strip():
        raise CascadeError(
            f"name is {name!r}, which names no file inside the models folder; give one such as my_style."
        )
    return name if name.endswith(SUFFIX) else f"{name}{SUFFIX}"


class TrainingNode(io.ComfyNode):
    """Base of the three nodes."""

    @classmethod
    def validate_inputs(cls, stage_c=None, text_encoder=None, compressor=None) -> bool | str:
        chosen = zip(MODELS, (stage_c, text_encoder, compressor), strict=True)
        answers = [check(role, name) for role, name in chosen]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, pictures: str, **others: Any) -> str:
        """A text that changes when pictures or captions do."""
        return stamp(sorted(host().picture_folder(pictures).rglob("*")))


class CascadeTrainLoRA(TrainingNode):
    """A LoRA from a folder of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTrainLoRA",
            display_name="Cascade Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA of Stage C on a folder of pictures. A run that was interrupted goes on.",
            inputs=[
                *common_inputs("lora"),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="How much the LoRA can hold; 4 to 64 are usual.",
                ),
                settings_input(),
            ],
            outputs=file_output("LoRA", "Cascade LoRA Apply"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return train_file("lora", "lora", inputs, {"lora": {"rank": inputs["rank"]}})


class CascadeTrainControlNet(TrainingNode):
    """A ControlNet from a folder of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTrainControlNet",
            display_name="Cascade Train ControlNet",
            category=CATEGORY,
            description=(
                "Trains a ControlNet on a folder of pictures; the hints are made of them. A run that was "
                "interrupted goes on."
            ),
            inputs=[
                *common_inputs("controlnet"),
                io.Combo.Input(
                    "hint",
                    options=[name for name in KINDS if name != "identity"],  # needs a network for faces
                    default="canny",
                    tooltip="What the ControlNet learns to follow: edges, a picture with a hole, or a small picture.",
                ),
                settings_input(),
            ],
            outputs=file_output("ControlNet", "Load Cascade ControlNet"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return train_file("controlnet", "controlnet", inputs, {"controlnet": {"hint": inputs["hint"]}})


class CascadeTrainTokens(TrainingNode):
    """A token from a folder of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTrainTokens",
            display_name="Cascade Train Token",
            category=CATEGORY,
            description=(
                "Learns a word of your own, a token, from a folder of pictures whose captions hold it. A run that was "
                "interrupted goes on."
            ),
            inputs=[
                *common_inputs("token"),
                io.String.Input(
                    "token",
                    default="[blob]",
                    tooltip="The word in captions and prompts that stands for what is learned.",
                ),
                io.String.Input(
                    "initial",
                    default="",
                    tooltip="Words that the token starts from, near to what is learned, such as star. May stay empty.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="How much the token can hold; 1 to 8 are usual.",
                ),
                settings_input(),
            ],
            outputs=file_output("token", "Cascade LoRA Apply"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        token = {"name": inputs["token"], "initial": inputs["initial"], "vectors": inputs["vectors"]}
        return train_file("tokens", "lora", inputs, {"tokens": [token]})
