# pyright: reportMissingImports=false
"""Nodes for the tests alone: values that are wrong on our sockets, as other models' nodes would make them; and one that
sets how often there are previews.
"""

import sys

from comfy_api.latest import ComfyExtension, io

CATEGORY = "Stable Cascade/tests"


def other_model(name: str):
    """A MODEL of SD 1.5 or SDXL, with a very small network of random weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    small = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1],
        "channel_mult": [1],
    }
    small |= {"transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1}
    small |= {"use_spatial_transformer": False, "num_heads": 1, "image_size": 32}
    if name == "SDXL":
        config = comfy.supported_models.SDXL({**small, "num_classes": "sequential", "adm_in_channels": 2816})
        model = comfy.model_base.SDXL(config)
    else:
        model = comfy.model_base.BaseModel(comfy.supported_models.SD15(small))
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


class OtherModel(io.ComfyNode):
    """The MODEL of another architecture, or none at all."""

    @classmethod
    def define_schema(cls):
        options = ["SD 1.5", "SDXL", "none"]
        return io.Schema(
            node_id="OtherModel",
            category=CATEGORY,
            inputs=[io.Combo.Input("name", options=options)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, name):
        return io.NodeOutput(None if name == "none" else other_model(name))


class OtherConditioning(io.ComfyNode):
    """CONDITIONING as text encoders of other widths give it; a pooled width of 0: without the pooled vector."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OtherConditioning",
            category=CATEGORY,
            inputs=[io.Int.Input("width", min=1), io.Int.Input("pooled", min=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, width, pooled):
        import torch

        values = {"pooled_output": torch.ones(1, pooled)} if pooled else {}
        return io.NodeOutput([[torch.ones(1, 77, width), values]])


class OtherLatent(io.ComfyNode):
    """A LATENT of any number of channels."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OtherLatent",
            category=CATEGORY,
            inputs=[io.Int.Input("channels", min=1), io.Int.Input("side", min=1)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, channels, side):
        import torch

        return io.NodeOutput({"samples": torch.zeros(1, channels, side, side)})


class PreviewInterval(io.ComfyNode):
    """How soon a preview follows another, from here on, as nodes/hosts/previews.py has it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PreviewInterval",
            category=CATEGORY,
            inputs=[io.Float.Input("interval", min=0), io.Float.Input("pause", min=0)],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, interval, pause):
        (previews,) = (
            module for name, module in sys.modules.items() if name.endswith(".nodes.hosts.previews")
        )
        vars(previews).update(INTERVAL=interval, PAUSE=pause)
        return io.NodeOutput()

    @classmethod
    def fingerprint_inputs(cls, interval, pause):
        return float("nan")  # it is run each time


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [OtherModel, OtherConditioning, OtherLatent, PreviewInterval]


async def comfy_entrypoint():
    return Extension()
