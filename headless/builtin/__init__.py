"""ComfyUI's own nodes that run here, under their ids and inputs.

Four that every graph needs, and those in ComfyUI's own examples for Stable Cascade
(https://comfyanonymous.github.io/ComfyUI_examples/stable_cascade). It is not a second ComfyUI: any other node,
sampler or scheduler is refused, and runs with --server.
"""

from ...nodes.api import io
from .conditioning import (
    CLIPTextEncode,
    CLIPVisionEncode,
    ControlNetApply,
    ControlNetApplyAdvanced,
    StableCascadeStageBConditioning,
    UnCLIPConditioning,
)
from .images import Canny, EmptyImage, ImageCompositeMasked, ImageScale, JoinImageWithAlpha
from .latents import (
    StableCascadeEmptyLatentImage,
    StableCascadeStageCVAEEncode,
    StableCascadeSuperResolutionControlnet,
    VAEDecode,
    VAEEncode,
)
from .loaders import CheckpointLoaderSimple, ControlNetLoader, UnCLIPCheckpointLoader
from .masks import GrowMask, InvertMask, ThresholdMask
from .pictures import LoadImage, LoadImageMask, PreviewImage, SaveImage
from .sampling import KSampler

BUILTIN_NODES: list[type[io.ComfyNode]] = [
    LoadImage,
    LoadImageMask,
    SaveImage,
    PreviewImage,
    CheckpointLoaderSimple,
    UnCLIPCheckpointLoader,
    ControlNetLoader,
    CLIPTextEncode,
    CLIPVisionEncode,
    UnCLIPConditioning,
    ControlNetApply,
    ControlNetApplyAdvanced,
    StableCascadeEmptyLatentImage,
    StableCascadeStageCVAEEncode,
    StableCascadeStageBConditioning,
    StableCascadeSuperResolutionControlnet,
    KSampler,
    VAEDecode,
    VAEEncode,
    ImageScale,
    Canny,
    EmptyImage,
    JoinImageWithAlpha,
    ImageCompositeMasked,
    InvertMask,
    ThresholdMask,
    GrowMask,
]
