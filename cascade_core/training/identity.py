"""Identity of a run: everything that decides its result, that is settings, and contents of pictures and networks."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import locate
from ..errors import CascadeError, printable, quoted
from ..reading import open_regular
from .data.cache import KEY_BYTES, Cache
from .data.fingerprint import pictures_digest
from .data.pictures import TrainingPicture
from .settings import Settings, settings_from_json

BLOCKS, BLOCK_BYTES = 2048, 8192  # read of a large file for its digest: a block every 3.5 MB in 7 GB
MODEL_FILES = ("config.json", "vocab.json", "merges.txt", "tokenizer.json")  # of a model's folder
PARTS = {  # the core's names of networks in the settings
    "models.stage_c": "stage_c",
    "models.text_encoder": "text",
    "models.stage_b": "stage_b",
    "models.stage_a": "stage_a",
    "models.compressor": "compressor",
    "models.image_encoder": "vision",
    "controlnet.start": "controlnet",
    "lora.start": "lora",
}
SHOWN = 8  # differences in a message

# Settings without effect on the trained weights, or of files whose contents are compared instead.
WITHOUT_EFFECT = (
    "models",
    "output",
    "validation",  # held-out pictures change the result only through the pictures trained on
    "preset",
    "data.folder",
    "data.tars",
    "data.mask_folder",
    "data.cache",
    "train.steps",
    "train.epochs",
    "train.gradient_checkpointing",
    "train.fsdp",
    "train.compile",
    "train.cuda_graphs",
    "train.stop_at",
    "train.stop_after",
    "train.deterministic",
    "lora.dialect",
    "lora.dtype",
    "finetune.dtype",
)
# Each machine may have them elsewhere.
PLACES = ("output.file", "output.folder", "output.prompts_file", "validation.folder", "validation.tars")
# Settings that decide how the result is written.
OF_THE_FILE = (
    "output.file",
    "lora.dialect",
    "lora.dtype",
    "finetune.dtype",
    "output.about",
    "output.captions_in_file",
    "output.raw",
)


def contents_of(
    settings: Settings,
    pictures: Sequence[TrainingPicture],
    cache: str,
    processes: int,
    asked: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Facts outside of the settings: digests of pictures and networks' files, and the number of processes.

    asked: called from time to time; may raise Interrupted.
    """
    contents = {
        "pictures and captions": pictures_named(settings, pictures, cache, asked),
        "processes": str(processes),
    }
    for key, path in _networks(settings).items():
        contents[f"{key} file"] = network_digest(path, _part(key), asked)[:16]
    return contents


def pictures_named(
    settings: Settings, pictures: Sequence[TrainingPicture], cache: str, asked: Callable[[], None]
) -> str:
    """The number of pictures and a digest of them and their captions, as text."""
    with_prompts = settings.models.image_encoder is not None
    named = settings.data.crops > 1
    digest = pictures_digest(pictures, Cache(cache, "contents"), with_prompts, asked, named)
    return f"{len(pictures)} pictures ({digest[:16]})"


def input_files(settings: Settings) -> dict[str, Path]:
    """The file that each network is read from, by its key in the settings."""
    return {key: locate(path, _part(key)) for key, path in _networks(settings).items()}


def _networks(settings: Settings) -> dict[str, Path]:
    """The networks that decide the result, by their keys."""
    names = {
        f"models.{key}": name
        for key, name in dataclasses.asdict(settings.models).items()
        if key in settings.deciding_models
    }
    if _starts_from_a_file(settings):
        names["controlnet.start"] = settings.controlnet.start
    names["lora.start"] = settings.lora.start
    names |= {f"tokens.{number}.start": each.start for number, each in enumerate(settings.tokens)}
    return {key: Path(name) for key, name in names.items() if name is not None}


def _part(key: str) -> str:
    return PARTS.get(key, "tokens")


def shared_settings(settings: Settings) -> dict[str, str]:
    """The settings that must be the same in all processes: all but the paths of files, which may differ."""
    values = _deciding(settings) | {
        key: value
        for key, value in _flat(settings).items()
        if key.partition(".")[0] in ("train", "output", "validation") and key not in PLACES
    }
    return {key: json.dumps(value) for key, value in values.items() if key != "train.precision"}


def differences(settings: Settings, contents: Mapping[str, str], metadata: Mapping[str, str]) -> list[str]:
    """The deciding values that differ from those in a state's metadata, such as "train.seed 0 → 1".

    A state of an earlier version has no contents; they are assumed to be the same.
    """
    saved_settings = saved(metadata)
    before = _deciding(saved_settings) if saved_settings is not None else {}
    now = _deciding(settings) if saved_settings is not None else {}
    if (saved_contents := _saved_contents(metadata)) is not None:
        before, now = {**before, **saved_contents}, {**now, **contents}
        if settings.train.fsdp:  # any number of processes can resume from its parts
            before, now = ({k: v for k, v in each.items() if k != "processes"} for each in (before, now))
    return [
        f"{key} {_shown(before.get(key))} → {_shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def refusal(path: Path, differing: Sequence[str]) -> CascadeError:
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return CascadeError(
        f"{path} is of a run with other settings ({'; '.join(differing[:SHOWN])}{more}); put them back, or begin anew "
        "with --fresh."
    )


def other_processes(contents: Mapping[str, str], metadata: Mapping[str, str]) -> str | None:
    """The number of processes that a state was written by, if it is not the present one."""
    before = (_saved_contents(metadata) or {}).get("processes")
    return None if before in (None, contents.get("processes")) else before


def unknown_parts(metadata: Mapping[str, str]) -> list[str]:
    """The facts that a state of an earlier version lacks, in words."""
    return ["settings"] * (saved(metadata) is None) + ["pictures and networks"] * (
        _saved_contents(metadata) is None
    )


def saved(metadata: Mapping[str, str]) -> Settings | None:
    """The settings that a state was written with; None where it does not hold them."""
    return settings_from_json(metadata.get("settings", ""))


def same_file(settings: Settings, metadata: Mapping[str, str]) -> bool:
    """Whether the settings write the result in the same form as those of the state."""
    before, now = saved(metadata), _flat(settings)
    return before is not None and all(_flat(before)[key] == now[key] for key in OF_THE_FILE)


def _shown(value: Any) -> str:
    return printable(value) if isinstance(value, str) else quoted(value)


def _saved_contents(metadata: Mapping[str, str]) -> dict[str, str] | None:
    try:
        contents = json.loads(metadata.get("contents", ""))
    except (ValueError, RecursionError):
        return None
    return contents if isinstance(contents, dict) and contents else None


def _deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide the result, by "section.key"; null is replaced by the value that it stands for."""
    without = WITHOUT_EFFECT if settings.network == "stage_b" else (*WITHOUT_EFFECT, "stage_b")
    values = {
        key: value
        for key, value in _flat(settings).items()
        if key not in WITHOUT_EFFECT and key.partition(".")[0] not in without
    }
    values["objective.weighting"] = settings.objective.loss_weight
    values["lora.alpha"] = settings.lora.rank if settings.lora.alpha is None else settings.lora.alpha
    places = ("folder", "tars", "mask_folder")  # the pictures in them are compared instead
    values["data.sets"] = [
        {key: value for key, value in each.items() if key not in places} for each in values["data.sets"]
    ]
    if _starts_from_a_file(settings):
        values["controlnet.start"] = "a file"
    values["lora.start"] = "a file" if settings.lora.start else None
    values["tokens"] = [{**each, "start": each["start"] and "a file"} for each in values["tokens"]]
    return values


def _starts_from_a_file(settings: Settings) -> bool:
    return settings.task == "controlnet" and settings.controlnet.start not in ("compressor", "random")


def _flat(settings: Settings) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in dataclasses.asdict(settings).items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def network_digest(path: Path, part: str, asked: Callable[[], None]) -> str:
    """A digest of a network's file, its shards and its configuration in a folder. asked: as in `contents_of`."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for file in _files_of(path, part):
        for block in _blocks(file):
            asked()
            digest.update(block)
    return digest.hexdigest()


def _files_of(path: Path, part: str) -> Iterator[Path]:
    file = locate(path, part)
    sharded = file.suffix == ".json" or "-of-" in file.name
    yield from sorted(file.parent.glob("*.safetensors")) if sharded else [file]
    for folder in (file.parent, file.parent / "tokenizer", file.parent.parent / "tokenizer"):
        if path.is_dir() or part == "text":
            yield from (each for name in MODEL_FILES if (each := folder / name).is_file())


def _blocks(path: Path) -> Iterator[bytes]:
    """A file's size and its bytes; of a large file, blocks evenly spread over it."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            yield str(size).encode()
            if size <= BLOCKS * BLOCK_BYTES:
                yield file.read(size)
                return
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                yield file.read(BLOCK_BYTES)
    except OSError as error:
        raise CascadeError(
            f"{path} cannot be read ({error.strerror or error}); make it readable or choose another."
        ) from None
