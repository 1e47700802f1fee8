"""Dialects: each program's spelling of a LoRA of Stable Cascade, one row each.

Sources: Stability-AI/StableCascade `modules/lora.py`, `train/train_c_lora.py`; kohya-ss/sd-scripts, branch
stable-cascade, `networks/lora.py`; Nerogar/OneTrainer `modules/modelSaver/wuerstchen`, before and after pull request
1563; huggingface/peft `utils/save_and_load.py`; ComfyUI `comfy/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .names import ATTENTION

PROJECTION = "text_projection"  # the text encoder's last layer
Spelling = Mapping[str, str]  # our names of the attention's layers -> theirs


def _spelling(*names: str) -> Spelling:
    return {ATTENTION[name]: name for name in names}


NATIVE = _spelling("attn.to_q", "attn.to_k", "attn.to_v", "attn.out_proj")
TO_OUT = _spelling("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out")
DIFFUSERS = _spelling("to_q", "to_k", "to_v", "to_out.0")
IN_PROJ = _spelling("attn.in_proj.0", "attn.in_proj.1", "attn.in_proj.2", "attn.out_proj")


@dataclass(frozen=True)
class Dialect:
    """Keys of one program's files.

    about             for users: which program, when
    kind              "named"; "numbered", the official file; "embedding", a learned token and nothing else
    stage_c, text     prefixes of Stage C's and the text encoder's layers; None: it holds none of these
    separator         between the parts of a layer's name
    attention         how the attention's layers are spelled
    down, up          suffixes of the names
    alpha             suffix; None: alpha / rank is multiplied into `up`
    row_magnitude     suffixes of DoRA's magnitudes, one per output row and one per input column; None: it cannot hold
                      them
    column_magnitude
    bare_magnitude    whether a magnitude has one dimension, (c_out,), or for a convolution (1, c_out, 1, 1), instead of
                      the weight's number of them
    tokens            prefix of a learned token's name; None: it holds none
    algorithms        the algorithms of LyCORIS that it has keys for, beside LoRA and DoRA
    caution           what a user who writes it has to know, in a sentence
    for_comfyui       whether ComfyUI's own nodes read it
    stage_b           whether it holds layers of Stage B, under the names that ComfyUI's own nodes read
    projection        name under which we write the text projection, where it is another than the other layers'
    """

    about: str
    stage_c: str | None = None
    text: str | None = None
    separator: str = "."
    attention: Spelling = field(default_factory=dict)
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str | None = ".alpha"
    row_magnitude: str | None = ".dora_scale"
    column_magnitude: str | None = ".dora_scale"
    bare_magnitude: bool = False
    tokens: str | None = None
    kind: str = "named"
    algorithms: frozenset[str] = frozenset()
    caution: str = ""
    for_comfyui: bool = False
    stage_b: bool = False
    projection: str | None = None

    def stage_c_name(self, layer: str) -> str:
        """The dialect's name of one of our layers of Stage C."""
        block, attention, leaf = layer.partition(".attention.")
        theirs = block + attention + self.attention.get(leaf, leaf) if attention else layer
        return f"{self.stage_c}{theirs.replace('.', self.separator)}"

    def text_name(self, layer: str) -> str:
        """The dialect's name of a layer of the text encoder."""
        return f"{self.text}{layer.replace('.', self.separator)}"

    def written_text_name(self, layer: str) -> str:
        """The name under which we write a layer of the text encoder."""
        if layer == PROJECTION and self.projection is not None:
            return self.projection
        return self.text_name(layer)


_A, _B = ".lora_A.weight", ".lora_B.weight"
_BUNDLED = "bundle_emb."
_LYCORIS = frozenset(("full differences", "LoHa", "LoKr", "OFT", "(IA)³"))

DIALECTS: dict[str, Dialect] = {
    "official": Dialect(
        "Stability AI's training code, February 2024: layers are numbered, not named",
        stage_c="weights.",
        down=".lora_down",
        up=".lora_up",
        alpha=None,
        row_magnitude=None,
        column_magnitude=None,
        tokens="embeddings.",
        kind="numbered",
    ),
    "kohya": Dialect(
        "kohya-ss sd-scripts since 25 February 2024; ComfyUI's own nodes read it too",
        "lora_unet_", "lora_te_", "_", NATIVE, algorithms=_LYCORIS, for_comfyui=True, stage_b=True,
        # kohya-ss' scripts train none; ComfyUI reads OneTrainer's name of it.
        projection="lora_prior_te_text_projection",
    ),
    "kohya_to_out": Dialect(
        "kohya-ss sd-scripts of 22 to 25 February 2024",
        "lora_unet_", "lora_te_", "_", TO_OUT, algorithms=_LYCORIS,
    ),
    "onetrainer": Dialect(
        "OneTrainer since March 2024, its LEGACY since July 2026; ComfyUI's own nodes read it too",
        "lora_prior_unet_", "lora_prior_te_", "_", NATIVE, tokens=_BUNDLED, for_comfyui=True,
    ),
    "onetrainer_first": Dialect(
        "OneTrainer's first proposal, February 2024",
        "lora_prior_unet_", "lora_prior_te_", "_", DIFFUSERS, tokens=_BUNDLED,
        caution="OneTrainer since July 2026 refuses its first dialect; for it choose onetrainer.",
    ),
    "omi": Dialect(
        "OneTrainer's backups of 2025, in the names of the Open Model Initiative",
        "unet.", "clip_g.", ".", IN_PROJ, tokens=_BUNDLED,
        caution="OneTrainer since July 2026 loads a file of this dialect without using any of it; for it choose "
        "onetrainer.",
    ),
    "diffusers": Dialect(
        "OneTrainer's DIFFUSERS since July 2026: diffusers' names",
        "prior.", "text_encoder.", ".", DIFFUSERS, _A, _B, None, ".lora_magnitude_vector.weight",
        bare_magnitude=True, tokens=_BUNDLED,
    ),
    "onetrainer_kohya": Dialect(
        "OneTrainer's KOHYA since July 2026",
        "lora_unet_", "lora_te_", "_", IN_PROJ, tokens=_BUNDLED,
    ),
    "onetrainer_original": Dialect(
        "OneTrainer's ORIGINAL since July 2026",
        "", None, ".", IN_PROJ, _A, _B,
    ),
    "onetrainer_comfy": Dialect(
        "OneTrainer's COMFY since July 2026",
        "diffusion_model.", None, ".", IN_PROJ, _A, _B, tokens=_BUNDLED,
    ),
    "peft": Dialect(
        "Hugging Face PEFT on diffusers' prior",
        "base_model.model.", None, ".", DIFFUSERS, _A, _B, None, ".lora_magnitude_vector", None, True,
        caution="PEFT reads a folder, which cascade convert-lora writes for an OUT that does not end in .safetensors; "
        "diffusers and this pack read the file.",
    ),
    "comfyui": Dialect(
        "ComfyUI's own trainer and its generic names; ComfyUI's own nodes read it",
        "diffusion_model.", "text_encoders.clip_g.transformer.", ".", NATIVE, tokens=_BUNDLED,
        algorithms=_LYCORIS - {"(IA)³"}, for_comfyui=True, stage_b=True,
    ),
    "embedding": Dialect(
        "embedding files of ComfyUI and OneTrainer: one learned token and no LoRA", tokens="", kind="embedding",
    ),
}  # fmt: skip

# Prefixes of names in files, the longer first: those of the dialects, and others that occur.
STAGE_C_PREFIXES = sorted(
    {*(d.stage_c for d in DIALECTS.values() if d.kind == "named" and d.stage_c is not None),
     "lora_prior_prior_", "lycoris_"},
    key=len, reverse=True,
)  # fmt: skip
TEXT_PREFIXES = sorted(
    {*(d.text for d in DIALECTS.values() if d.text is not None), "text_encoders.clip_g.", "clip_g.transformer.", ""},
    key=len, reverse=True,
)  # fmt: skip
