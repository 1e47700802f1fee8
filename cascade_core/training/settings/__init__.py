"""The settings of a training run: one YAML file, read into frozen dataclasses. The files of this folder list all keys.

    data: {folder: pictures}
    train: {steps: 2000}
    output: {file: my_style.safetensors}

is a whole file. Paths are relative to it; networks go by the names that the loaders offer.
"""

from .data import DataSetSettings, DataSettings
from .models import DECODERS, ModelSettings
from .objective import ObjectiveSettings, Weighting
from .output import OutputSettings, SamplePrompt, check_prompt_count
from .reading import read_settings, settings_from_json, settings_of
from .resolving import resolve
from .tasks import (
    ControlNetSettings,
    FinetuneSettings,
    LoRASettings,
    Reads,
    StageBSettings,
    TaskName,
    TokenSettings,
)
from .train import OptimizerName, TrainSettings
from .validation import ValidationSettings
from .whole import Settings

__all__ = [
    "DECODERS",
    "ControlNetSettings",
    "DataSetSettings",
    "DataSettings",
    "FinetuneSettings",
    "LoRASettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerName",
    "OutputSettings",
    "Reads",
    "SamplePrompt",
    "Settings",
    "StageBSettings",
    "TaskName",
    "TokenSettings",
    "TrainSettings",
    "ValidationSettings",
    "Weighting",
    "check_prompt_count",
    "read_settings",
    "resolve",
    "settings_from_json",
    "settings_of",
]
