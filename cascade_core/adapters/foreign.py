"""Recognises LoRA files of other models, and changes that are not low-rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# How wide the text is that the cross attention of a Stable Diffusion UNet takes.
_UNETS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}
_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]\b")
_DOWN = re.compile(r"lora_down|lora_A|lora\.down")
# A telling part of a name, with dots or underscores, and the model; the first that is found counts.
_MODELS = (
    (r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d", "Flux"),
    (r"joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]add_k_proj", "Stable Diffusion 3"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn", "Wan"),
    (r"lora_te2_|text_encoder_2\.", "Stable Diffusion XL"),
    (
        r"(down|up)_blocks[._]\d+[._](attentions|resnets)|mid_block|middle_block|(input|output)_blocks",
        "Stable Diffusion",
    ),
    (r"transformer_blocks[._]\d", "a diffusion transformer"),
    (r"effnet_mapper|pixels_mapper|clip_mapper", "Stable Cascade's Stage B"),
)
# Endings of names, and what the file holds in place of down and up.
_ALGORITHMS = (
    (".lokr_", "LoKr"),
    (".hada_", "LoHa"),
    (".oft_", "OFT"),
    (".boft_", "BOFT"),
    (".on_input", "IA3"),
    (".a1.weight", "GLoRA"),
    (".lora_mid.weight", "LoCon in Tucker form"),
    (".lora_embedding_A", "a LoRA of the token embedding"),
)


def foreign_model(tensors: Mapping[str, Tensor]) -> str | None:
    """The model's name, such as "Stable Diffusion XL", or None. tensors: those that are not Stable Cascade's."""
    for name, tensor in tensors.items():
        attention = _CROSS_ATTENTION.search(name)
        if (
            attention
            and _DOWN.search(name, attention.end())
            and tensor.ndim == 2
            and tensor.shape[1] in _UNETS
        ):
            return _UNETS[tensor.shape[1]]
    return next((model for part, model in _MODELS if any(re.search(part, name) for name in tensors)), None)


def other_algorithms(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups a file's names by the algorithm, other than LoRA, that writes such: {algorithm: names}."""
    algorithms: dict[str, list[str]] = {}
    for name in names:
        for part, algorithm in _ALGORITHMS:
            if part in name:
                algorithms.setdefault(algorithm, []).append(name)
                break
    return algorithms
