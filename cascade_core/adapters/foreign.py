"""Recognises LoRA files of other models, and algorithms that are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# Width of the text states that a Stable Diffusion UNet's cross attention takes.
_UNETS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL's refiner",
    2048: "Stable Diffusion XL",
}
_CROSS_ATTENTION = re.compile(r"attn2[._]to_[kv]\b")
_DOWN = re.compile(r"lora_down|lora_A|lora\.down")
# A characteristic part of a name, with dots or underscores, and its model; the first match counts.
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
)
# A characteristic part of a name, and the unsupported algorithm that writes it; the first match counts.
_ALGORITHMS = (
    (r"\.(a|b)[12]\.weight$|\.bm\.weight$|\.glora_", "GLoRA"),
    (r"\.(q|p)_layer\.weight$|\.lambda_layer$", "T-LoRA"),
    (r"\.lora_embedding_[AB]", "LoRA of the token embedding by PEFT"),
    (r"\.reshape_weight$", "LoRA that enlarges its layers"),
    (r"\.bias_(indices|values|size)$", "LoRA with LyCORIS' sparse residual"),
    (r"\.oft_(embedding_R|diag)|(^|[._])oft_unet_", "OFT of another program"),
    (r"(^|\.)pvera_", "PVeRA"),
    (r"(^|\.)vera_", "VeRA"),
    (r"(^|\.)vblora_", "VB-LoRA"),
    (r"(^|\.)randlora_", "RandLoRA"),
    (r"\.fourierft_", "FourierFT"),
    (r"\.waveft_", "WaveFT"),
    (r"\.hra_u\b", "HRA"),
    (r"\.bone_", "Bone"),
    (r"\.miss_block", "MiSS"),
    (r"\.c3a_", "C³A"),
    (r"\.road_(theta|alpha)", "RoAd"),
    (r"\.shira_", "SHiRA"),
    (r"\.delora_", "DeLoRA"),
    (r"\.gralora_", "GraLoRA"),
    (r"\.hira_", "HiRA"),
    (r"\.osf_", "OSF"),
    (r"\.psoft_", "PSOFT"),
    (r"\.poly_(lora|router)", "Poly"),
    (r"\.tinylora_", "TinyLoRA"),
    (r"(^|\.)unilora_", "UniLoRA"),
    (r"\.adamss_", "AdaMSS"),
    (r"\.beft_", "BEFT"),
    (r"\.deft_", "DEFT"),
    (r"\.frod_", "FRoD"),
    (r"\.lily_", "Lily"),
    (r"\.peanut_", "PEANuT"),
    (r"\.shadow_", "Shadow"),
    (r"\.supertuning_", "SuperTuning"),
    (r"\.ln_tuning_layers", "LayerNorm tuning"),
    (r"\.trainable_tokens_", "trainable tokens"),
    (r"xlora_classifier", "X-LoRA"),
    (r"lora_(latent_mapping|xs)|default_lora_latent", "LoRA-XS"),
    (r"(^|\.)prompt_embeddings$", "prompt, prefix or P-tuning"),
    (r"adaption_(prompt|gate)", "LLaMA-Adapter"),
    (r"(^|[._])delta$|spectral_shift", "SVDiff"),
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
    """Groups a file's names by the unsupported algorithms that write them: {algorithm: names}."""
    algorithms: dict[str, list[str]] = {}
    for name in names:
        for part, algorithm in _ALGORITHMS:
            if re.search(part, name):
                algorithms.setdefault(algorithm, []).append(name)
                break
    return algorithms
