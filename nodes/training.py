"""Training from a graph: a LoRA, a ControlNet or tokens, by the same runs as `cascade train`."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from ..cascade_core.errors import CascadeError, quoted
from ..cascade_core.file_names import LONGEST_NAME, inside, path_fault
from ..cascade_core.hints.kinds import KINDS
from .api import io, searched_as
from .files import check, file_input, find, stamp
from .hosts import host
from .training_data import folder_path, folder_stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from ..cascade_core.training.loop import TrainingProgress
    from ..cascade_core.training.settings import Settings

CATEGORY = "Stable Cascade/training"
SUFFIX = ".safetensors"
PRESETS = (
    "8gb",
    "12gb",
    "16gb",
    "24gb",
    "48gb",
)  # as in cascade_core/training/presets.py, which takes long to import
LONGEST_SETTINGS = 20_000  # characters; ComfyUI's server is blocked while they are parsed
MODELS = ("stage_c", "text_encoder", "compressor")
STAGE_C_TOOLTIP = "The Stage C to train on; its own file stays as it is."
LORA_STAGE_C_TOOLTIP = (
    "The Stage C to train on; its own file stays as it is. A LoRA of Stage B uses it for samples alone."
)


def common_inputs(kind: str, stage_c: str = STAGE_C_TOOLTIP) -> list[Any]:
    """The inputs of every kind of training. stage_c: the tooltip of Stage C"""
    return [
        io.String.Input(
            "name",
            default=f"my_{kind}",
            tooltip="Name of the new file in the models folder, without an extension.",
        ),
        io.String.Input(
            "pictures",
            default="pictures",
            tooltip=(
                "A folder of pictures with captions, in the input folder or where the server's owner allows it. "
                "star.png is described by star.txt, one caption a line."
            ),
        ),
        file_input("stage_c", "stage_c", stage_c),
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
                "the networks were trained at (1024); smaller is faster."
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
            # Otherwise the interface would change the seed after each run, and a cancelled run could not go on.
            control_after_generate=False,
            tooltip="Decides what is random: the same seed trains the same file again.",
        ),
    ]


def preset_input() -> Any:
    return io.Combo.Input(
        "preset",
        options=["none", "auto", *PRESETS],
        default="none",
        optional=True,
        tooltip=(
            "Settings for a card with this much memory; auto: for this card. They take precedence over size "
            "and batch_size above, and settings over them."
        ),
    )


def settings_input() -> Any:
    return io.String.Input(
        "settings",
        default="",
        multiline=True,
        optional=True,
        tooltip=(
            "Further settings of `cascade train`, in YAML; the help page shows some. They take precedence "
            "over the inputs above."
        ),
    )


def file_output(kind: str, node: str) -> list[Any]:
    """Output with the trained file's name. node: the loader that lists it."""
    return [
        io.String.Output(display_name="file", tooltip=f"The name of the {kind}'s file, to choose in {node}.")
    ]


def node_settings(task: Any, inputs: dict[str, Any], sections: dict[str, Any]) -> Settings:
    """The typed settings of a run. Raises CascadeError for bad values, and for data that clients must not read.

    inputs: the node's inputs known so far; sections: the task's own settings.
    """
    from ..cascade_core.training.presets import preset_values
    from ..cascade_core.training.settings import settings_of

    def known(*names: str) -> dict[str, Any]:
        return {name: inputs[name] for name in names if name in inputs}

    values: dict[str, Any] = {
        "models": known(*MODELS),
        "data": {"folder": str(folder_path(inputs.get("pictures", "."))), **known("size")},
        "train": known("steps", "batch_size", "learning_rate", "seed"),
        "output": {"file": ".", "folder": "."},
        **sections,
    }
    preset = inputs.get("preset", "none")
    if preset != "none":
        values["preset"], defaults = preset_values(preset, task)
        for section, more in defaults.items():
            values[section] = {**values.get(section, {}), **more}
    for section, more in checked_settings(inputs.get("settings", "")).items():
        mixed = isinstance(more, dict) and isinstance(values.get(section), dict)
        values[section] = {**values[section], **more} if mixed else more
    settings = settings_of(values, task, "settings")
    tars = tuple(str(host().data_path(pattern)) for pattern in settings.data.tars)
    return replace(settings, data=replace(settings.data, tars=tars))


def train_file(task: Any, role: str, inputs: dict[str, Any], sections: dict[str, Any]) -> io.NodeOutput:
    """Trains, or resumes where the run was interrupted; returns the file's name. sections: the task's own settings."""
    from ..cascade_core.checkpoints.files import check_writable
    from ..cascade_core.training.run import train
    from ..cascade_core.training.settings import resolve
    from ..cascade_core.training.state import STATE

    name, models = file_name(inputs["name"]), host().new_files_folder(role).resolve()
    file = inside(models, name)
    if file is None:
        raise CascadeError(
            f"name is {quoted(name)}, which leads out of {models} by a link; give another name."
        )
    check_writable(file)
    settings = node_settings(task, inputs, sections)
    with host().training() as report:
        settings = replace(settings, output=replace(settings.output, file=str(file)))
        settings = in_own_folder(resolve(settings, Path.cwd(), find), name, inputs["pictures"])
        view = LiveView(report, settings.train.steps)
        outcome = train(
            settings,
            host().notify,
            view.progress,
            report,
            host().interrupted,
            keep_existing=True,
            check=host().data_check(),
            show=view.show,
        )
        if outcome.finished:  # a finished run needs no state; log and samples stay
            Path(settings.output.folder or "", STATE).unlink(missing_ok=True)
    assert outcome.file is not None
    return io.NodeOutput(outcome.file.relative_to(models).as_posix())


class LiveView:
    """A run's view in its node: the bar, and one picture of the latest curve above the latest samples.

    report: the host's function; steps: the number that the run takes
    """

    def __init__(self, report: Callable[..., None], steps: int) -> None:
        self.report, self.step, self.steps = report, 0, steps
        self.files: dict[str, Path] = {}

    def progress(self, progress: TrainingProgress) -> None:
        self.step, self.steps = progress.step, progress.steps
        self.report(self.step, self.steps)

    def show(self, path: Path) -> None:
        """Shows a picture that the run wrote."""
        if path.exists():  # a curve needs two points
            self.files["samples" if path.parent.name == "samples" else "curve"] = path
            self.report(self.step, self.steps, self._page())

    def _page(self) -> Image.Image:
        from PIL import Image

        parts = []
        for kind in ("curve", "samples"):
            if kind in self.files:
                with Image.open(self.files[kind]) as picture:
                    parts.append(picture.convert("RGB"))
        page = Image.new(
            "RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white"
        )
        top = 0
        for part in parts:
            page.paste(part, ((page.width - part.width) // 2, top))
            top += part.height
        return page


def file_name(text: str) -> str:
    """The new file's name in normal form: composed Unicode, `/` between folders, stripped, with the suffix.

    Raises CascadeError for a name that leads out of the models folder, or that some file system does not allow.
    """
    plain = unicodedata.normalize("NFC", text[: 20 * LONGEST_NAME]).replace("\\", "/")
    stem = plain.strip()[: -len(SUFFIX)] if plain.strip().lower().endswith(SUFFIX) else plain
    parts = [part.strip() for part in stem.split("/")]
    fault = path_fault("/".join(parts)) or ("names no file" if parts[-1] in ("", ".") else None)
    if fault:
        raise CascadeError(f"name is {quoted(text)}, which {fault}; give one such as my_style.")
    return f"{PurePosixPath(*parts)}{SUFFIX}"


def in_own_folder(settings: Settings, name: str, pictures: str) -> Settings:
    """The settings with a folder unique to this run, and with a common folder for the latents of all runs.

    So a run is resumed if nothing has changed, and otherwise starts anew, in a folder beside the old one.
    """
    from ..cascade_core.training.data.access import Access
    from ..cascade_core.training.data.tars import expand

    runs = host().training_folder().resolve()
    networks = [Path(path) for path in asdict(settings.models).values() if path]
    files = [file for path in networks for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files += expand(settings.data.tars, Access(host().interrupted))
    identity = json.dumps([settings.as_json(), folder_stamp(pictures), stamp(files)])
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    folder = runs / f"{settings.task}_{PurePosixPath(name).stem[:40]}_{digest}"
    former = host().former_training_folder() / f"{settings.task}_{PurePosixPath(name).stem}"
    if former.is_dir():
        host().notify(
            f"{former} is of an earlier version, and is left as it is; runs are kept in {runs} now."
        )
    return replace(
        settings,
        data=replace(settings.data, cache=str(runs / "cache")),
        output=replace(settings.output, folder=str(folder)),
    )


# Decided by the host: a graph from elsewhere must not choose where to write.
_FIXED = (
    ("output", "file"),
    ("output", "folder"),
    ("output", "prompts_file"),
    ("data", "folder"),
    ("data", "sets"),
    ("data", "mask_folder"),
    ("data", "cache"),
    ("validation", "folder"),
    ("validation", "tars"),
)


def checked_settings(text: str) -> dict[str, Any]:
    """Reads the settings' sections. Raises CascadeError for keys that other inputs decide."""
    from ..cascade_core.training.typed_yaml import parse_yaml

    if len(text) > LONGEST_SETTINGS:
        raise CascadeError(f"settings has {len(text):,} characters; give at most {LONGEST_SETTINGS:,}.")
    values = parse_yaml(text, "settings")
    for section, key in _FIXED:
        if isinstance(values.get(section), dict) and key in values[section]:
            raise CascadeError(f"settings: {section}.{key} is decided by the node's other inputs; remove it.")
    return values


class TrainingNode(io.ComfyNode):
    """Base of the three nodes. TASK: as in `cascade train`; SECTIONS: stand-ins for settings that inputs decide."""

    TASK: ClassVar[str]
    SECTIONS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def validate_inputs(
        cls,
        name=None,
        pictures=None,
        stage_c=None,
        text_encoder=None,
        compressor=None,
        settings=None,
        preset=None,
    ) -> bool | str:
        """Checks before a graph is queued. None: the value comes over a link, and is checked later."""
        from ..cascade_core.training.settings import resolve

        networks = dict(zip(MODELS, (stage_c, text_encoder, compressor), strict=True))
        inputs = {"pictures": pictures, "settings": settings, "preset": preset, **networks}
        inputs = {key: value for key, value in inputs.items() if value is not None}
        try:
            if name is not None:
                file_name(name)
            typed = node_settings(cls.TASK, inputs, cls.SECTIONS)
            if None not in networks.values():
                resolve(typed, Path.cwd(), find)
        except CascadeError as error:
            return str(error)
        answers = [check(role, file) for role, file in networks.items()]
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, pictures: str, **others: Any) -> str:
        """A text that changes when pictures or captions do."""
        return folder_stamp(pictures)


class CascadeTrainLoRA(TrainingNode):
    """A LoRA from a folder of pictures."""

    TASK = "lora"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTrainLoRA",
            display_name="Cascade Train LoRA",
            category=CATEGORY,
            description=(
                "Trains a LoRA on a folder of pictures: of Stage C, or as settings say of Stage B or the text encoder. "
                "A run that was interrupted goes on."
            ),
            **searched_as("stable cascade, training, fine-tune, dreambooth"),
            inputs=[
                *common_inputs("lora", LORA_STAGE_C_TOOLTIP),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="How much the LoRA can hold; 4 to 64 are usual.",
                ),
                settings_input(),
                preset_input(),
            ],
            outputs=file_output("LoRA", "Cascade LoRA Apply"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return train_file("lora", "lora", inputs, {"lora": {"rank": inputs["rank"]}})


class CascadeTrainControlNet(TrainingNode):
    """A ControlNet from a folder of pictures."""

    TASK = "controlnet"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CascadeTrainControlNet",
            display_name="Cascade Train ControlNet",
            category=CATEGORY,
            description=(
                "Trains a ControlNet on a folder of pictures; the hints are made from them. A run that was "
                "interrupted goes on."
            ),
            **searched_as("stable cascade, training, fine-tune"),
            inputs=[
                *common_inputs("controlnet"),
                io.Combo.Input(
                    "hint",
                    options=[name for name in KINDS if name != "identity"],  # needs a network for faces
                    default="canny",
                    tooltip="What the ControlNet learns to follow: edges, a picture with a hole, or a small picture.",
                ),
                settings_input(),
                preset_input(),
            ],
            outputs=file_output("ControlNet", "Load Cascade ControlNet"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return train_file("controlnet", "controlnet", inputs, {"controlnet": {"hint": inputs["hint"]}})


class CascadeTrainTokens(TrainingNode):
    """A token from a folder of pictures."""

    TASK = "tokens"
    SECTIONS: ClassVar[dict[str, Any]] = {"tokens": [{"name": "token"}]}

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
            **searched_as("stable cascade, training, textual inversion, embedding"),
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
                preset_input(),
            ],
            outputs=file_output("token", "Cascade LoRA Apply"),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        token = {"name": inputs["token"], "initial": inputs["initial"], "vectors": inputs["vectors"]}
        return train_file("tokens", "lora", inputs, {"tokens": [token]})
