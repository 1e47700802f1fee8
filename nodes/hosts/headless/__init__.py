"""The host of a process without ComfyUI: the same functions as `hosts.comfyui`, on nothing but torch.

Weights stay on the device between nodes as far as its memory allows; others are evicted or streamed (`device.py`).
"""

from ..reporting import notify
from .adapters import stage_config, text_network, with_adapter
from .clip import encode_texts, load_text_encoder
from .control import apply_controlnet, describe_controlnet, load_controlnet
from .folders import find_file, input_folder, list_files
from .model import describe_network, load_network
from .sampling import sample, with_guidance
from .training import (
    data_check,
    data_path,
    former_training_folder,
    interrupted,
    new_files_folder,
    training,
    training_folder,
)
from .vae import decode_latent, describe_vae, encode_pixels, load_compressor, load_stage_a
from .vision import encode_image, load_vision
from .weights import first_non_finite

__all__ = [
    "apply_controlnet",
    "data_check",
    "data_path",
    "decode_latent",
    "describe_controlnet",
    "describe_network",
    "describe_vae",
    "encode_image",
    "encode_pixels",
    "encode_texts",
    "find_file",
    "first_non_finite",
    "former_training_folder",
    "input_folder",
    "interrupted",
    "list_files",
    "load_compressor",
    "load_controlnet",
    "load_network",
    "load_stage_a",
    "load_text_encoder",
    "load_vision",
    "new_files_folder",
    "notify",
    "sample",
    "stage_config",
    "text_network",
    "training",
    "training_folder",
    "with_adapter",
    "with_guidance",
]
