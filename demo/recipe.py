"""The demo cascade in numbers: each network's configuration and how it is trained."""

from typing import Any

from cascade_nodes.cascade_core.training.settings import TrainSettings

PICTURE = 256  # pixels
COMPRESSED = 192  # pixels of the compressor's input: 32 times the latent's 6 × 6
LATENT = (16, 6, 6)  # Stage C
STAGE_B_LATENT = (4, 64, 64)

TRAIN_SCENES = 200_000
CAPTIONS_PER_SCENE = 4
WRONG_CAPTIONS_PER_SCENE = 4  # and one with its relation inverted
OBJECTS = (0.35, 0.4, 0.25)  # shares of the scenes of one, two and three objects
# Relative to other sizes. Every colour has the same weight: the more white objects there are, the better a network
# learns that the shape held out in white never is.
SCENE_WEIGHTS = {"small": 2.0}

OTHER_FRAMES_SHARE = 0.25  # of the compressor's and Stage B's steps with frames other than the square
STAGE_A_NOISE = 0.02  # of Stage A's latents
COMPRESSOR_NOISE = 0.15  # of the compressor's latents
EFFNET_NOISE = 0.25  # the most noise added to them for Stage B
PICTURE_SHARE = 30.0  # weight of decoding pictures from embeddings, beside the contrastive loss
# Shares of Stage C's steps (STAGE_C_STEPS): frames of other proportions; scenes whose objects are each a picture
# prompt of its own; among these, scenes of three objects.
STAGE_C_STEPS = {"frames": 0.25, "together": 0.15, "three": 0.2}
# Shares of a batch in other steps: wide pictures, from their embeddings alone; scenes with traces of another object
# around a mask; of the rest, scenes with their picture as a prompt, half of them without words.
STAGE_C_WIDE, STAGE_C_EDITED, STAGE_C_PICTURES = 0.15, 0.1, 0.4

STAGE_A = {
    "levels": 2, "bottleneck_blocks": 8, "c_hidden": 96, "c_latent": 4, "codebook_size": 1024, "scale_factor": 0.43,
}  # fmt: skip
COMPRESSOR = {
    "c_latent": 16,
    "stem": 16,
    "stages": [
        ["fused", 1, 3, 1, 16, 1],
        ["fused", 4, 3, 2, 32, 2],
        ["fused", 4, 3, 2, 48, 2],
        ["mbconv", 4, 3, 2, 80, 3],
        ["mbconv", 4, 3, 1, 96, 2],
        ["mbconv", 4, 3, 2, 128, 3],
    ],
    "c_last": 256,
}
PREVIEWER = {"c_in": 16, "c_hidden": 192, "c_out": 3}
TEXT = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
    "projection_dim": 192, "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip
VISION = {
    "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 5,
    "projection_dim": 192, "image_size": 96, "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
STAGE_C = {
    "c_in": 16, "c_out": 16, "c_r": 64, "patch_size": 1, "c_cond": 192, "c_hidden": [256, 256], "nhead": [4, 4],
    "blocks": [[1, 3], [3, 1]], "block_repeat": [[1, 1], [1, 1]], "level_config": ["CTA", "CTA"],
    "c_clip_text": 192, "c_clip_text_pooled": 192, "c_clip_img": 192, "c_clip_seq": 4, "kernel_size": 3,
    "dropout": [0.0, 0.0], "self_attn": True, "t_conds": ["sca", "crp"], "switch_level": [False],
}  # fmt: skip
STAGE_B = {
    "c_in": 4, "c_out": 4, "c_r": 64, "patch_size": 2, "c_cond": 192, "c_hidden": [64, 128, 320],
    "nhead": [-1, -1, 5], "blocks": [[2, 2, 2], [2, 3, 2]], "block_repeat": [[1, 1, 1], [1, 1, 1]],
    "level_config": ["CT", "CT", "CTA"], "c_clip": 192, "c_clip_seq": 4, "c_effnet": 16, "c_pixels": 3,
    "kernel_size": 3, "dropout": [0, 0, 0], "self_attn": True, "t_conds": ["sca"],
}  # fmt: skip

# In bf16, except Stage A; with the fastest kernels instead of deterministic ones.
TRAINED: dict[str, Any] = {
    "warmup": 200, "final_learning_rate": 0.02, "precision": "bf16", "deterministic": False,
}  # fmt: skip
SETTINGS = {
    "stage_a": TrainSettings(steps=6_000, learning_rate=2e-3, batch_size=64, weight_decay=0.0, **TRAINED),
    "compressor": TrainSettings(steps=3_067, learning_rate=2e-3, batch_size=256, **TRAINED),
    "clip": TrainSettings(steps=4_599, learning_rate=1e-3, batch_size=1024, weight_decay=0.05, **TRAINED),
    "layout": TrainSettings(steps=4_000, learning_rate=1e-3, batch_size=1024, weight_decay=0.05, **TRAINED),
    "vision": TrainSettings(steps=4_000, learning_rate=5e-4, batch_size=1024, weight_decay=0.05, **TRAINED),
    "stage_b": TrainSettings(steps=6_253, learning_rate=1e-3, batch_size=256, ema=0.9995, **TRAINED),
    "stage_c": TrainSettings(steps=8_819, learning_rate=1e-3, batch_size=1024, ema=0.9995, **TRAINED),
}
