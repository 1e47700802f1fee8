"""List of the nodes that ComfyUI and the embedded host register."""

from .api import ComfyExtension, io
from .conditioning import CascadeImagePrompt, CascadeTextEncode
from .control import (
    CascadeCanny,
    CascadeControlNetApply,
    CascadeIdentityHint,
    CascadeInpaintHint,
    CascadeSuperResolutionHint,
)
from .inpainting import CascadeInpaintComposite, CascadeOutpaint
from .latents import CascadeDecode, CascadeEmptyLatent, CascadeEncode, CascadeUpscaleLatent
from .loaders import (
    CascadeCheckpointLoader,
    CascadeCompressorLoader,
    CascadeControlNetLoader,
    CascadeTextEncoderLoader,
    CascadeVisionLoader,
    StageAVAE,
    StageBLoader,
    StageCLoader,
)
from .lora import CascadeLoRAApply
from .sampling import CascadeDecoderSampler, CascadePriorSampler
from .scheduling import CascadeGuidance, CascadeScheduler
from .training import CascadeTrainControlNet, CascadeTrainLoRA, CascadeTrainTokens

NODES: list[type[io.ComfyNode]] = [
    StageCLoader,
    StageBLoader,
    StageAVAE,
    CascadeCompressorLoader,
    CascadeTextEncoderLoader,
    CascadeVisionLoader,
    CascadeControlNetLoader,
    CascadeCheckpointLoader,
    CascadeTextEncode,
    CascadeImagePrompt,
    CascadeEmptyLatent,
    CascadeEncode,
    CascadePriorSampler,
    CascadeDecoderSampler,
    CascadeDecode,
    CascadeScheduler,
    CascadeGuidance,
    CascadeLoRAApply,
    CascadeControlNetApply,
    CascadeCanny,
    CascadeInpaintHint,
    CascadeSuperResolutionHint,
    CascadeIdentityHint,
    CascadeOutpaint,
    CascadeInpaintComposite,
    CascadeUpscaleLatent,
    CascadeTrainLoRA,
    CascadeTrainControlNet,
    CascadeTrainTokens,
]


class CascadeExtension(ComfyExtension):
    """Extension that registers the nodes of Stable Cascade."""

    async def on_load(self) -> None:
        """Called once, by ComfyUI versions that can replace nodes."""
        from .hosts.comfyui.replacements import register_replacements

        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
