"""ComfyUI's nodes for masks."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...cascade_core.geometry import MAX_SIZE
from ...nodes.api import io
from ...nodes.sockets import check_mask

CATEGORY = "mask"


class InvertMask(io.ComfyNode):
    """Exchanges inside and outside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InvertMask",
            display_name="InvertMask",
            category=CATEGORY,
            description="1 less the mask.",
            inputs=[io.Mask.Input("mask", tooltip="The mask.")],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, mask) -> io.NodeOutput:
        check_mask(mask, "mask")
        return io.NodeOutput(1.0 - mask)


class ThresholdMask(io.ComfyNode):
    """Makes a mask of only 0 and 1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ThresholdMask",
            display_name="ThresholdMask",
            category=CATEGORY,
            description="1 where the mask is above a value, else 0.",
            inputs=[
                io.Mask.Input("mask", tooltip="The mask."),
                io.Float.Input(
                    "value", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="Values above it become 1."
                ),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, mask, value) -> io.NodeOutput:
        check_mask(mask, "mask")
        return io.NodeOutput((mask > value).float())


class GrowMask(io.ComfyNode):
    """Makes a mask wider or narrower by pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GrowMask",
            display_name="GrowMask",
            category=CATEGORY,
            description="Widens a mask by this many pixels, or narrows it by a number below 0.",
            inputs=[
                io.Mask.Input("mask", tooltip="The mask."),
                io.Int.Input("expand", default=0, min=-MAX_SIZE, max=MAX_SIZE, tooltip="Pixels."),
                io.Boolean.Input(
                    "tapered_corners", default=True, tooltip="Whether it grows along rows and columns only."
                ),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def execute(cls, mask, expand, tapered_corners) -> io.NodeOutput:
        check_mask(mask, "mask")
        sign = -1.0 if expand < 0 else 1.0
        grown = sign * mask.reshape(-1, 1, *mask.shape[-2:]).float()
        for _ in range(abs(expand)):
            row = F.max_pool2d(grown, (1, 3), stride=1, padding=(0, 1))
            if tapered_corners:
                wider = torch.maximum(row, F.max_pool2d(grown, (3, 1), stride=1, padding=(1, 0)))
            else:
                wider = F.max_pool2d(row, (3, 1), stride=1, padding=(1, 0))
            if torch.equal(wider, grown):  # the mask fills the picture
                break
            grown = wider
        return io.NodeOutput(sign * grown[:, 0])
