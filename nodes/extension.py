"""The list of nodes that ComfyUI and the embedded host register."""

from .api import ComfyExtension, io
from .conditioning import CascadeImagePrompt, CascadeTextEncode
from .latents import CascadeDecode, CascadeEmptyLatent, CascadeEncode
from .loaders import (
    CascadeCompressorLoader,
    CascadeTextEncoderLoader,
    CascadeVisionLoader,
    StageAVAE,
    StageBLoader,
    StageCLoader,
)
from .sampling import CascadeDecoderSampler, CascadePriorSampler

NODES: list[type[io.ComfyNode]] = [
    StageCLoader,
    StageBLoader,
    StageAVAE,
    CascadeCompressorLoader,
    CascadeTextEncoderLoader,
    CascadeVisionLoader,
    CascadeTextEncode,
    CascadeImagePrompt,
    CascadeEmptyLatent,
    CascadeEncode,
    CascadePriorSampler,
    CascadeDecoderSampler,
    CascadeDecode,
]


class CascadeExtension(ComfyExtension):
    """Stable Cascade for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
