"""Recognises files of other models by the names of their tensors."""

from collections.abc import Mapping

from torch import Tensor

EMBEDDING = "textual inversion embedding"
# The beginning of a characteristic name, after one of the prefixes, and its model; the first match counts.
_PREFIXES = ("", "model.diffusion_model.", "model.")
_NAMES = (
    ("double_blocks.0.img_attn.qkv.weight", "Flux model"),
    ("single_transformer_blocks.0.proj_mlp.weight", "Flux model in diffusers' layout"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3 model"),
    ("transformer_blocks.0.attn.add_k_proj.weight", "Stable Diffusion 3 model in diffusers' layout"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5 text encoder"),
    ("text_model.", "CLIP text encoder"),
    ("vision_model.", "CLIP image encoder"),
    ("visual.transformer.resblocks.0.", "CLIP image encoder in OpenCLIP's layout"),
    ("transformer.resblocks.0.", "CLIP text encoder in OpenCLIP's layout"),
    ("cond_stage_model.transformer.text_model.", "Stable Diffusion 1.5 checkpoint"),
    ("first_stage_model.decoder.conv_in.weight", "Stable Diffusion VAE"),
    ("decoder.conv_in.weight", "Stable Diffusion VAE"),
    ("emb_params", EMBEDDING),
    ("clip_l", EMBEDDING),
    ("string_to_param.", EMBEDDING),
    ("cond_mapper.0.weight", "Würstchen v2 prior"),
    ("effnet_mappers.", "Würstchen v2 decoder"),
)
# In the name of every layer of the network that UltraPixel trains beside Stage C, after its trainer's numbers.
_ULTRAPIXEL = ".wtoken_postfc."
# Prefixes of that network's parts where it is stored inside a Stage C.
_ULTRAPIXEL_PARTS = ("agg_net.", "agg_net_up.", "norm_down_blocks.", "norm_up_blocks.")
MOST_EMBEDDINGS = 4  # tensors of an embedding file with unknown names
_LORA_ENDINGS = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_down",
    ".lora_up",
)
# Width of the text states that a Stable Diffusion UNet's cross attention takes.
_UNETS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL refiner",
    2048: "Stable Diffusion XL",
}
_UNET_KEYS = ("input_blocks.", "down_blocks.0.attentions.", "down_blocks.1.attentions.")


def foreign_name(tensors: Mapping[str, Tensor]) -> str | None:
    """The kind of file, such as "Stable Diffusion XL checkpoint", or None if it is not recognised."""
    if any(name.endswith(_LORA_ENDINGS) for name in tensors):
        return "LoRA"
    for name, tensor in tensors.items():
        if any(key in name for key in _UNET_KEYS) and name.endswith("attn2.to_k.weight") and tensor.ndim == 2:
            return f"{_UNETS.get(tensor.shape[1], 'Stable Diffusion')} checkpoint"
    for beginning, model in _NAMES:
        if any(name.startswith(prefix + beginning) for prefix in _PREFIXES for name in tensors):
            return model
    if any(_ULTRAPIXEL in name for name in tensors):
        return "network that UltraPixel adds to Stage C"
    named = all("." not in name and tensor.ndim in (1, 2) for name, tensor in tensors.items())
    return EMBEDDING if named and 0 < len(tensors) <= MOST_EMBEDDINGS else None


def is_ultrapixel(name: str) -> bool:
    """Whether a tensor inside a Stage C is of the network that UltraPixel adds to it."""
    return name.startswith(_ULTRAPIXEL_PARTS)
