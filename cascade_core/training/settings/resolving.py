"""Resolves settings: makes paths absolute, and fills in networks that they do not name."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from .models import ROLES, ModelSettings, decoders_of, trained_decoder
from .whole import Settings


def resolve(settings: Settings, folder: Path, find_model: Callable[[str, str], Path]) -> Settings:
    """Makes paths absolute: files and folders relative to `folder`, networks by find_model(role, name)."""

    def at(path: str) -> str:
        # os.path does not raise for an unknown ~user or circular links; opening the file does
        return os.path.realpath(folder / os.path.expanduser(path))

    def at_given(path: str | None) -> str | None:
        return at(path) if path else None

    data = dataclasses.replace(
        settings.data,
        folder=at_given(settings.data.folder),
        tars=tuple(map(at, settings.data.tars)),
        sets=tuple(
            dataclasses.replace(
                each,
                folder=at_given(each.folder),
                tars=tuple(map(at, each.tars)),
                mask_folder=at_given(each.mask_folder),
            )
            for each in settings.data.sets
        ),
        mask_folder=at_given(settings.data.mask_folder),
        cache=at_given(settings.data.cache),
    )
    validation = dataclasses.replace(
        settings.validation,
        folder=at_given(settings.validation.folder),
        tars=tuple(map(at, settings.validation.tars)),
    )
    output = settings.output
    run = output.folder or f"runs/{Path(output.file).stem}"
    prompts_file = at_given(output.prompts_file)
    output = dataclasses.replace(output, file=at(output.file), folder=at(run), prompts_file=prompts_file)

    def model(role: str, name: str | None) -> str | None:
        return None if name is None else os.path.realpath(find_model(role, name))

    names = dataclasses.asdict(settings.models)
    if settings.network == "stage_b":
        names |= trained_decoder(names, find_model)
    elif output.sample_every:
        names |= decoders_of(names, find_model)
    needed = names if output.sample_every else settings.deciding_models  # Stage B is trained without Stage C
    files = {
        key: model(ROLES.get(key, key), name) if key != "stage_c" or key in needed else name
        for key, name in names.items()
    }
    control = settings.controlnet
    if settings.task == "controlnet" and control.start not in ("compressor", "random"):
        control = dataclasses.replace(control, start=model("controlnet", control.start))
    lora = dataclasses.replace(settings.lora, start=model("lora", settings.lora.start))
    tokens = tuple(
        dataclasses.replace(each, start=model("embedding", each.start)) for each in settings.tokens
    )
    return dataclasses.replace(
        settings,
        tokens=tokens,
        data=data,
        validation=validation,
        output=output,
        controlnet=control,
        lora=lora,
        models=ModelSettings(**files),  # type: ignore[arg-type]
    )
