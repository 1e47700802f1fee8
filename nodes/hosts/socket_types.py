"""Socket types of the V3 node API that our nodes use, with the keywords of ComfyUI 0.3.64.

All keywords but an input's id (and a Combo's options) must be named, since their order differs between hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from types import new_class
from typing import Any, ClassVar


class NumberDisplay(StrEnum):
    """Widget of a number on the canvas."""

    number = "number"
    slider = "slider"


class UploadType(StrEnum):
    """Kind of file that a Combo lets the user upload."""

    image = "image_upload"


class FolderType(StrEnum):
    """Host's folders for pictures."""

    input = "input"
    output = "output"
    temp = "temp"


# Keywords whose name in the host's dictionaries differs from the Python one.
_NAMES = {"force_input": "forceInput", "dynamic_prompts": "dynamicPrompts", "display_mode": "display"}


@dataclass(eq=False, kw_only=True)
class Input:
    """Input of a node. `io_type` is the type name of its link."""

    io_type: ClassVar[str] = "*"
    id: str = field(kw_only=False)
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Options of this input as in ComfyUI's `/object_info`, without those that are None."""
        options = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "id" and value is not None:
                name = _NAMES.get(entry.name, entry.name)
                options[name] = value.value if isinstance(value, Enum) else value
        return options

    def get_io_type(self) -> str:
        """Type that an output must have to be connected here."""
        return self.io_type


@dataclass(eq=False, kw_only=True)
class WidgetInput(Input):
    """Input with a widget for its value unless something is connected."""

    default: Any = None
    socketless: bool | None = None
    force_input: bool | None = None


@dataclass(eq=False, kw_only=True)
class Output:
    """Output of a node."""

    io_type: ClassVar[str] = "*"
    id: str | None = field(default=None, kw_only=False)
    display_name: str | None = None
    tooltip: str | None = None


class SocketType:
    """Socket type: its name (`io_type`), its `Input` and its `Output`, both bound to that name."""

    io_type: ClassVar[str] = "*"
    Input = Input
    Output = Output

    def __init_subclass__(cls, io_type: str) -> None:
        cls.io_type = io_type
        for name in ("Input", "Output"):
            setattr(cls, name, type(name, (getattr(cls, name),), {"io_type": io_type}))


def Custom(io_type: str) -> type[SocketType]:  # noqa: N802 (the host's name)
    """Makes a socket type without a widget, identified by its name."""
    return new_class(io_type, (SocketType,), {"io_type": io_type})


Model = Custom("MODEL")
Clip = Custom("CLIP")
Vae = Custom("VAE")
ClipVision = Custom("CLIP_VISION")
ClipVisionOutput = Custom("CLIP_VISION_OUTPUT")
ControlNet = Custom("CONTROL_NET")
Conditioning = Custom("CONDITIONING")
Latent = Custom("LATENT")
Image = Custom("IMAGE")
Mask = Custom("MASK")
Sampler = Custom("SAMPLER")
Sigmas = Custom("SIGMAS")


class Int(SocketType, io_type="INT"):
    """Integer. The host checks `min` and `max`; `step` is only a hint for the widget."""

    @dataclass(eq=False, kw_only=True)
    class Input(WidgetInput):
        default: int | None = None
        min: int | None = None
        max: int | None = None
        step: int | None = None
        control_after_generate: bool | None = None
        display_mode: NumberDisplay | None = None


class Float(SocketType, io_type="FLOAT"):
    """Real number. The host checks `min` and `max`; `step` and `round` are only hints for the widget."""

    @dataclass(eq=False, kw_only=True)
    class Input(WidgetInput):
        default: float | None = None
        min: float | None = None
        max: float | None = None
        step: float | None = None
        round: float | None = None
        display_mode: NumberDisplay | None = None


class String(SocketType, io_type="STRING"):
    """Text."""

    @dataclass(eq=False, kw_only=True)
    class Input(WidgetInput):
        default: str | None = None
        multiline: bool = False
        placeholder: str | None = None
        dynamic_prompts: bool | None = None


class Boolean(SocketType, io_type="BOOLEAN"):
    """Boolean switch."""

    @dataclass(eq=False, kw_only=True)
    class Input(WidgetInput):
        default: bool | None = None
        label_on: str | None = None
        label_off: str | None = None


class Combo(SocketType, io_type="COMBO"):
    """Choice from a list of options."""

    @dataclass(eq=False, kw_only=True)
    class Input(WidgetInput):
        options: list[str] | list[int] | type[Enum] | None = field(default=None, kw_only=False)
        default: str | int | Enum | None = None
        control_after_generate: bool | None = None
        upload: UploadType | None = None
        image_folder: FolderType | None = None
        force_input: ClassVar[None] = None  # a Combo has no such keyword

        def __post_init__(self) -> None:
            if isinstance(self.options, type):
                self.options = [member.value for member in self.options]

        def as_dict(self) -> dict[str, Any]:
            options = super().as_dict()
            options["multiselect"] = False
            if self.upload is not None:
                options[options.pop("upload")] = True
            return options
