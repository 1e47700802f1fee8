"""Small nodes that do next to nothing, written against whichever node API there is: ours, or ComfyUI's."""

from pathlib import Path

import torch

from cascade_nodes.nodes.api import io

Toy = io.Custom("TOY")

CALLS: list[str] = []  # the nodes that ran, in order


class ToyNumber(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyNumber",
            display_name="Toy Number",
            category="Toy/values",
            description="A number and its scale.",
            inputs=[
                io.Int.Input("value", default=1, min=0, max=100, step=5, tooltip="How much."),
                io.Float.Input("scale", default=1.0, min=-2.5, max=2.5, step=0.5, round=0.01, optional=True),
            ],
            outputs=[Toy.Output("toy", display_name="TOY NUMBER", tooltip="The number.")],
        )

    @classmethod
    def execute(cls, value, scale=1.0):
        CALLS.append("ToyNumber")
        return io.NodeOutput(value * scale)


class ToyText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyText",
            category="Toy/values",
            inputs=[
                io.String.Input(
                    "text", multiline=True, default="", placeholder="words", dynamic_prompts=True
                ),
                io.Combo.Input("mode", options=["soft", "hard"], default="soft"),
                io.Combo.Input("many", options=[f"option {i}" for i in range(21)], optional=True),
                io.Boolean.Input("flip", default=False, label_on="yes", label_off="no", optional=True),
            ],
            outputs=[Toy.Output(), io.String.Output(display_name="TEXT")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, text, mode, many="", flip=False):
        CALLS.append("ToyText")
        return io.NodeOutput(text[::-1] if flip else text, f"{text}, {mode}")


class ToyJoin(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyJoin",
            category="Toy",
            inputs=[
                Toy.Input("left", tooltip="First."),
                Toy.Input("right", display_name="Right one", optional=True),
                io.Int.Input(
                    "count", default=1, min=1, control_after_generate=True, force_input=True, optional=True
                ),
            ],
            outputs=[Toy.Output()],
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, left, right=None, count=1):
        CALLS.append("ToyJoin")
        return io.NodeOutput([left, right] * count)


class ToyPair(io.ComfyNode):
    """Its two numbers must be even together; asks the host to let it judge their range."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyPair",
            category="Toy",
            inputs=[
                io.Int.Input("a", min=0, max=10, display_mode=io.NumberDisplay.slider),
                io.Int.Input("b", min=0, max=10, socketless=True),
                io.Int.Input("c", min=0, max=10, optional=True),
            ],
            outputs=[Toy.Output()],
        )

    @classmethod
    def validate_inputs(cls, a, b):
        if a is not None and a == 13:
            raise KeyError("unlucky")
        return True if ((a or 0) + b) % 2 == 0 else f"{a} + {b} is odd"

    @classmethod
    def execute(cls, a, b, c=0):
        CALLS.append("ToyPair")
        return io.NodeOutput(a + b + c)


class ToyShow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyShow",
            display_name="Toy Show",
            category="Toy",
            inputs=[Toy.Input("toy"), io.Image.Input("image", optional=True)],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, toy, image=None):
        CALLS.append("ToyShow")
        return io.NodeOutput(ui={"text": [repr(toy)], "shown_by": [cls.hidden.unique_id]})


class ToyImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyImage",
            category="Toy",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=["a.png"],
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    control_after_generate=True,
                    optional=True,
                ),
                io.Mask.Input("mask", optional=True),
            ],
            outputs=[io.Image.Output()],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, file="", mask=None):
        CALLS.append("ToyImage")
        return io.NodeOutput(torch.linspace(0, 1, 2 * 3 * 3).reshape(1, 2, 3, 3))


class ToyCount(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyCount", inputs=[Toy.Input("toy", optional=True)], outputs=[io.Int.Output()]
        )

    @classmethod
    def execute(cls, toy=()):
        CALLS.append("ToyCount")
        return io.NodeOutput(len(toy))


class ToyFile(io.ComfyNode):
    """The text of a file; runs again when that has changed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyFile", category="Toy", inputs=[io.String.Input("path")], outputs=[Toy.Output()]
        )

    @classmethod
    def fingerprint_inputs(cls, path):
        return Path(path).read_text()

    @classmethod
    def execute(cls, path):
        CALLS.append("ToyFile")
        return io.NodeOutput(Path(path).read_text())


TOYS = {
    cls.__name__: cls for cls in (ToyNumber, ToyText, ToyJoin, ToyPair, ToyShow, ToyImage, ToyCount, ToyFile)
}
