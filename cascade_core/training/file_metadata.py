"""Metadata of a trained file, under the names that other programs show.

`modelspec.*` is Stability AI's ModelSpec 1.0.1, which ComfyUI's model library, SwarmUI and OneTrainer read; `ss_*` is
kohya's, which A1111, Forge and the civitai tools read. None of it is a time or a path, so that the same run writes
the same bytes; captions and folder names are included only if the settings ask for them.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

from .data.pictures import TrainingPicture
from .settings import Settings

ARCHITECTURES = {  # in SwarmUI's terms; a LoRA of the text encoder counts as one of Stage C
    "stage_c": "stable-cascade-v1-stage-c",
    "stage_b": "stable-cascade-v1-stage-b",
    "text_encoder": "stable-cascade-v1-text-encoder",
}
KINDS = {"lora": "/lora", "controlnet": "/controlnet", "finetune": "", "tokens": "/textual-inversion"}
MODULES = {
    "lora": "networks.lora", "loha": "lycoris.kohya", "lokr": "lycoris.kohya"
}  # fmt: skip


def file_metadata(settings: Settings, step: int, pictures: Iterable[TrainingPicture]) -> dict[str, str]:
    """The metadata of `output.file` after `step`. pictures: those that were trained on."""
    output, train, pictures = settings.output, settings.train, list(pictures)
    size, network = settings.data.size, settings.network
    if settings.task == "lora" and network == "text_encoder":
        network = "stage_c"
    architecture = ARCHITECTURES[network]
    model = getattr(settings.models, network) or settings.models.stage_c
    entries: dict[str, object] = {
        "trained_steps": step,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture + KINDS[settings.task],
        "modelspec.implementation": "https://github.com/Stability-AI/StableCascade",
        "modelspec.title": output.about.get("title", Path(output.file).stem),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "epsilon",
        **{f"modelspec.{key}": value for key, value in output.about.items()},
        "ss_output_name": Path(output.file).stem,
        "ss_sd_model_name": PurePath(model).name,
        "ss_base_model_version": architecture,
        "ss_steps": step,
        "ss_max_train_steps": train.steps,
        "ss_learning_rate": train.learning_rate,
        "ss_lr_scheduler": train.schedule,
        "ss_optimizer": train.optimizer,
        "ss_seed": train.seed,
        "ss_mixed_precision": train.precision,
        "ss_batch_size_per_device": train.batch_size,
        "ss_gradient_accumulation_steps": train.accumulate,
        "ss_resolution": f"({size}, {size})",
        "ss_num_train_images": len(pictures),
    }
    if settings.task == "lora":
        lora = settings.lora
        arguments = {"algo": lora.algorithm, "dora_wd": lora.dora, "rs_lora": lora.rslora}
        entries |= {
            "ss_network_module": MODULES[lora.algorithm],
            "ss_network_dim": lora.rank,
            "ss_network_alpha": lora.rank if lora.alpha is None else lora.alpha,
            "ss_network_args": as_json(arguments),
        }
    if output.captions_in_file:
        entries |= _of_the_data(pictures, settings)
    return {key: value if isinstance(value, str) else f"{value}" for key, value in sorted(entries.items())}


def _of_the_data(pictures: list[TrainingPicture], settings: Settings) -> dict[str, str]:
    """kohya's `ss_dataset_dirs` (folders with their numbers of pictures) and `ss_tag_frequency` (captions' tags)."""
    counts: dict[str, Counter[str]] = {}
    images: Counter[str] = Counter()
    repeats: dict[str, int] = {}
    for picture in pictures:
        own = settings.data.sets[picture.set] if picture.set >= 0 else None
        place = (settings.data if own is None else own).folder or "tars"
        folder = PurePath(picture.name).parent.name or PurePath(place).name
        images[folder] += 1
        repeats[folder] = settings.data.repeat * (1 if own is None else own.repeat)
        tags = (tag.strip() for caption in picture.captions for tag in caption.split(","))
        counts.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    folders = {name: {"n_repeats": repeats[name], "img_count": images[name]} for name in images}
    return {"ss_dataset_dirs": as_json(folders), "ss_tag_frequency": as_json(counts)}


def as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
