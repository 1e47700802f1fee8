"""ComfyUI as host: its own classes around our networks, one file per socket family.

Only this package imports `comfy`, `folder_paths` and the like. Written for 0.3.64 and later; where later
versions differ, the code tests for features, not for version numbers.
"""

from .adapters import stage_config, text_network, with_adapter
from .client_files import data_check, data_path, former_training_folder, training_folder
from .clip import encode_texts, load_text_encoder
from .control import apply_controlnet, describe_controlnet, load_controlnet
from .folders import find_file, input_folder, list_files
from .model import describe_network, load_network
from .progress import notify
from .sampling import sample, with_guidance
from .training import interrupted, new_files_folder, training
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
