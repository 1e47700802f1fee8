"""Settings from files, under present and former names."""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from ...errors import CascadeError, quoted
from ..presets import with_preset
from ..typed_yaml import build, read_yaml, unknown_name
from .tasks import TaskName
from .train import OptimizerName, TrainSettings
from .whole import Settings

logger = logging.getLogger(__name__)

SECTIONS = ("lora", "controlnet", "finetune", "tokens")  # each belongs to the task of its name
FORMER_NAMES = {  # former names of keys, by section; still read
    "train": {"clip_norm": "max_grad_norm"},
    "objective": {
        "largest_weight": "max_loss_weight",
        "share_at_start": "pure_noise_share",
        "own_path": "on_policy_share",
    },
}


FORMER_VALUES = {  # former values of keys: weights of the error in x0, not named so
    "objective": {
        "weighting": {
            name: f"x0_{name}"
            for name in ("snr", "snr_plus_one", "min_snr", "min_snr_plus_one", "truncated_snr", "sigmoid")
        }
    }
}


def read_settings(path: Path, task: TaskName, preset: str | None = None) -> Settings:
    """Reads the settings of a YAML file. Raises CascadeError with the file's name for whatever is wrong in it.

    The file is the user's own, so it may name any optimiser. preset: replaces the file's own.
    """
    values = read_yaml(path)
    if preset is not None:
        values = {**values, "preset": preset}
    return settings_of(values, task, str(path), any_optimizer=True)


def settings_of(
    values: Mapping[str, Any], task: TaskName, where: str, any_optimizer: bool = False
) -> Settings:
    """Builds settings from a file's values. where: the file's name, for messages.

    any_optimizer: whether the values may name a class to import and call with arguments; never for values from
    anybody but the user, such as a client of a server. Keys under their former names are read; one line of warning is
    logged for all of them.
    """
    try:
        values, renamed = with_current_names(values)
        if renamed:
            logger.warning("%s: %s. The former names are still read.", where, "; ".join(renamed))
        for section in SECTIONS:
            if section in values and section != task and (section, task) != ("tokens", "lora"):
                raise CascadeError(f"{section} does not belong to `cascade train {task}`; remove it.")
        if "stage_b" in values and _network(values, task) != "stage_b":
            raise CascadeError(f"stage_b does not belong here; it is for `{task}: {{network: stage_b}}`.")
        if "task" in values:
            raise CascadeError("'task' is not a setting; it is the command's: `cascade train lora`.")
        _check_known(values, task)
        settings = build(Settings, {**with_preset(values, task), "task": task})
        if not any_optimizer:
            _check_no_class(settings.train)
        return settings
    except CascadeError as error:
        raise CascadeError(f"{where}: {error}") from None


def _check_known(values: Mapping[str, Any], task: TaskName) -> None:
    """Raises CascadeError for a section that no task has; it lists those of this one."""
    others = {"task", *SECTIONS} - {task} - ({"tokens"} if task == "lora" else set())
    known = tuple(field.name for field in fields(Settings) if field.name not in others)
    for name in values:
        if name not in known:
            raise CascadeError(unknown_name(f"{quoted(name)} is not a setting", name, known))


def _network(values: Mapping[str, Any], task: TaskName) -> Any:
    section = values.get(task)
    return section.get("network") if isinstance(section, Mapping) else None


def _check_no_class(train: TrainSettings) -> None:
    if train.optimizer not in get_args(OptimizerName):
        raise CascadeError(
            f"train.optimizer is {quoted(train.optimizer)}, but only `cascade train` imports a class, from its own "
            f"settings file; choose one of {', '.join(get_args(OptimizerName))}."
        )
    if train.optimizer_arguments:
        raise CascadeError(
            "train.optimizer_arguments are for `cascade train` and its own settings file; remove them."
        )


def settings_from_json(text: str) -> Settings | None:
    """Reads the result of `Settings.as_json`, also under former names; None for anything else."""
    try:
        values, _ = with_current_names(json.loads(text))
        return build(Settings, values)
    except (ValueError, TypeError, RecursionError):  # CascadeError among them
        return None


def with_current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values under current names, a phrase for each renamed key and value).

    Raises CascadeError where a key stands under both names.
    """
    current, renamed = dict(values), []
    for section, names in FORMER_NAMES.items():
        keys = current.get(section)
        if not isinstance(keys, Mapping):
            continue
        for former in names.keys() & keys.keys():
            name = names[former]
            if name in keys:
                raise CascadeError(
                    f"{section} holds both {name} and {former}, which is its former name; remove {former}."
                )
        current[section] = {names.get(key, key): value for key, value in keys.items()}
        renamed += [f"{section}.{key} is now called {section}.{names[key]}" for key in keys if key in names]
    for section, former_values in FORMER_VALUES.items():
        for key, names in former_values.items():
            keys = current.get(section)
            value = keys.get(key) if isinstance(keys, Mapping) else None
            if isinstance(value, str) and value in names:
                current[section] = {**current[section], key: names[value]}
                renamed.append(f"{section}.{key} {value} is now called {names[value]}")
    return current, renamed
