"""The settings of a training run: one YAML file, read into frozen dataclasses. This file lists all keys.

    data: {folder: pictures}
    train: {steps: 2000}
    output: {file: my_style.safetensors}

is a whole file. Paths are relative to it; networks go by the names that the loaders offer.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import CascadeError
from ..hints.kinds import KindName
from .typed_yaml import build, read_yaml

logger = logging.getLogger(__name__)

TaskName = Literal["lora", "controlnet", "finetune", "tokens"]
Reads = Literal["small", "enlarged"]
Weighting = Literal[
    "p2", "adaptive", "debiased", "constant", "snr", "snr_plus_one", "min_snr", "min_snr_plus_one", "truncated_snr",
    "sech", "sigmoid",
]  # fmt: skip


@dataclass(frozen=True)
class ModelSettings:
    """Networks by file name. `previewer` decodes samples; `image_encoder` encodes image prompts."""

    stage_c: str = "stage_c_bf16.safetensors"
    text_encoder: str = "stable_cascade_text_encoder.safetensors"
    compressor: str = "effnet_encoder.safetensors"
    previewer: str | None = None
    image_encoder: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from, and how they are shown."""

    folder: str | None = None  # of pictures with captions, subfolders too
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    size: int = 1024  # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: float = 0.05  # the share of rows that are trained without words
    image_prompt_dropout: float = 0.05  # the same without their image prompts, chosen apart from the words
    flip: bool = False  # half of the rows are mirrored
    cache: str | None = None  # folder where latents are kept between runs
    repeat: int = 1  # how often an epoch shows each picture

    def __post_init__(self) -> None:
        object.__setattr__(self, "tars", (self.tars,) if isinstance(self.tars, str) else tuple(self.tars))
        if self.folder is None and not self.tars:
            raise CascadeError("The training data has neither a folder nor tars; name one of them.")
        if not 64 <= self.size <= 4096:
            raise CascadeError(f"The data's size is {self.size}; it must lie within 64 and 4096 pixels.")
        if not 8 <= self.bucket_step <= self.size:
            raise CascadeError(
                f"The data's bucket_step is {self.bucket_step}; it must lie within 8 and the size, {self.size}."
            )
        for name in ("caption_dropout", "image_prompt_dropout"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise CascadeError(f"{name} is {share}; it is a share, from 0 to 1.")
        if self.repeat < 1:
            raise CascadeError(f"The data's repeat is {self.repeat}; it must be at least 1.")


@dataclass(frozen=True)
class TrainSettings:
    """The loop. A batch is `batch_size` pictures on each accelerator, `accumulate` times a step."""

    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "cosine"
    final_learning_rate: float = 0.0  # where the cosine ends, as a share of the learning rate
    warmup: int = 50  # steps
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.99)
    max_grad_norm: float = 1.0  # of the gradient; 0 is none
    ema: float = 0.999  # of the average that is written; 0 writes the last weights
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on an accelerator
    gradient_checkpointing: bool | None = None  # null: where Stage C is large
    compile: bool = False
    cuda_graphs: bool = True  # on an accelerator, where a step draws nothing at random within the network
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise CascadeError(f"train.{name} is {getattr(self, name)}; it must be at least 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise CascadeError(
                f"train.learning_rate is {self.learning_rate}; it must be above 0, such as 1e-4."
            )
        if not 0 <= self.final_learning_rate <= 1:
            raise CascadeError(
                f"train.final_learning_rate is {self.final_learning_rate}; it is a share, from 0 to 1."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise CascadeError(
                f"train.betas is {list(self.betas)}; two numbers from 0 to below 1 are expected."
            )
        if not 0 <= self.ema < 1:
            raise CascadeError(
                f"train.ema is {self.ema}; it must be at least 0 (none) and below 1, such as 0.999."
            )


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network learns to predict. The defaults are the published ones.

    diffusion     the noise, at uniform times, the error weighed by `weighting` of the log-SNR
    consistency   the end of its own guided path in one step, for few steps of the `lcm` sampler (LoRA alone)
    """

    kind: Literal["diffusion", "consistency"] = "diffusion"
    weighting: Weighting | None = None  # null: p2; for consistency, which begins at pure noise, debiased
    max_loss_weight: float | None = None
    pure_noise_share: float = 0.0  # of a batch that is trained at pure noise
    shift: float = 1.0  # of the schedule that times are drawn from; above 1 is more noise
    guidance: tuple[float, ...] = (
        4.0,
    )  # consistency: the teacher's cfg; of two bounds, another for each picture
    cfg_rescale: float = 0.7
    solver_steps: int = 50  # consistency: into how many steps the teacher's path is cut
    sampling_steps: int | None = None  # consistency: for so many steps of `lcm` alone; null: for any number
    on_policy_share: float = (
        0.0  # consistency: the share of a batch that begins from the student's own last step
    )

    def __post_init__(self) -> None:
        if not 0 <= self.pure_noise_share <= 1:
            raise CascadeError(
                f"objective.pure_noise_share is {self.pure_noise_share}; it is a share, from 0 to 1."
            )
        if not 0 <= self.on_policy_share <= 1:
            raise CascadeError(
                f"objective.on_policy_share is {self.on_policy_share}; it is a share, from 0 to 1."
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise CascadeError(
                f"objective.shift is {self.shift}; it must be above 0 (1 is the published one)."
            )
        if len(self.guidance) not in (1, 2) or not all(map(math.isfinite, self.guidance)):
            raise CascadeError(
                f"objective.guidance is {list(self.guidance)}; one number or two bounds are expected."
            )
        if self.solver_steps < 2:
            raise CascadeError(f"objective.solver_steps is {self.solver_steps}; it must be at least 2.")
        steps = self.sampling_steps
        if steps is not None and not (1 <= steps <= self.solver_steps and self.solver_steps % steps == 0):
            raise CascadeError(
                f"objective.sampling_steps is {steps}; solver_steps ({self.solver_steps}) must be a multiple of it."
            )

    @property
    def loss_weight(self) -> Weighting:
        return self.weighting or ("debiased" if self.kind == "consistency" else "p2")


@dataclass(frozen=True)
class LoRASettings:
    """`targets`: all (linear layers and 1×1 convolutions), attention, or patterns such as `up_blocks.*to_q`."""

    rank: int = 16
    alpha: float | None = None  # null: the rank
    targets: tuple[str, ...] = ("all",)
    text_encoder: bool = False
    text_learning_rate: float = 0.5  # as a share of the learning rate
    token_learning_rate: float = 5.0  # the same for `tokens`, which a LoRA may learn with it
    dialect: str = "kohya"
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"  # of the file

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CascadeError(f"lora.rank is {self.rank}; it must be at least 1.")


@dataclass(frozen=True)
class ControlNetSettings:
    """`start`: compressor (its backbone's weights), random, or the file of a ControlNet to go on from.

    `config` gives what differs from the published one: proj_blocks, bottleneck_mode, stem, stages, c_last, …
    """

    hint: KindName = "canny"
    start: str = "compressor"
    config: dict[str, Any] = field(default_factory=dict)
    scale: float = 2.0  # super_resolution: how many times smaller the small picture is, a side
    reads: Reads = (
        "small"  # super_resolution: what the compressor reads, as published, or the picture enlarged
    )

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 16:
            raise CascadeError(f"controlnet.scale is {self.scale}; it must lie within 1 and 16 (2 is usual).")


@dataclass(frozen=True)
class FinetuneSettings:
    """`modules`: all, or patterns of Stage C's modules, such as `up_blocks.1.*`."""

    modules: tuple[str, ...] = ("all",)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the file


@dataclass(frozen=True)
class TokenSettings:
    """A token to learn: its name (`blob` is [blob] in captions), words that it begins as, how many vectors it has."""

    name: str
    initial: str = ""
    vectors: int = 1


@dataclass(frozen=True)
class OutputSettings:
    """`file` is what the run gives; `folder` holds its checkpoint, log, curve and samples (null: runs/NAME)."""

    file: str
    folder: str | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    sample_every: int = 0  # 0 is never
    prompts: tuple[str, ...] = ()
    sample_steps: int = 20
    sample_cfg: float = 4.0
    sample_shift: float = 2.0
    sample_sampler: Literal["ddpm", "ddim", "lcm", "dpmpp_2m"] = "ddpm"

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise CascadeError(f"output.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class Settings:
    """A whole file; `task` is the command's."""

    task: TaskName
    data: DataSettings
    output: OutputSettings
    models: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    controlnet: ControlNetSettings = field(default_factory=ControlNetSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    tokens: tuple[TokenSettings, ...] = ()

    def __post_init__(self) -> None:
        if self.task == "tokens" and not self.tokens:
            raise CascadeError(
                "tokens is missing; name at least one, as `tokens: [{name: '[blob]', initial: star}]`."
            )
        if self.objective.kind == "consistency" and self.task != "lora":
            raise CascadeError("objective.kind consistency trains a LoRA; use `cascade train lora`.")
        if self.objective.kind == "consistency" and (self.lora.text_encoder or self.tokens):
            raise CascadeError(
                "objective.kind consistency trains Stage C alone; leave text_encoder and tokens out."
            )

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def equals_json(self, text: str) -> bool:
        """Whether `text` is these settings as `as_json` gives them, or gave them under their former names."""
        try:
            values, _ = with_current_names(json.loads(text))
            return build(Settings, values).as_json() == self.as_json()
        except (ValueError, TypeError, CascadeError):
            return False


ROLES = {"image_encoder": "vision"}  # as the loaders call what `models` names otherwise
SECTIONS = ("lora", "controlnet", "finetune", "tokens")  # each is of the task of its name
FORMER_NAMES = {  # of keys, by section: still read
    "train": {"clip_norm": "max_grad_norm"},
    "objective": {
        "largest_weight": "max_loss_weight",
        "share_at_start": "pure_noise_share",
        "own_path": "on_policy_share",
    },
}


def read_settings(path: Path, task: TaskName) -> Settings:
    """Read the settings of a YAML file. Raises CascadeError with the file's name for whatever is wrong in it."""
    return settings_of(read_yaml(path), task, str(path))


def settings_of(values: Mapping[str, Any], task: TaskName, where: str) -> Settings:
    """Build settings from a file's values. where: the file's name, for messages.

    Keys under their former names are read; one line of warning is logged for all of them.
    """
    try:
        values, renamed = with_current_names(values)
        if renamed:
            logger.warning("%s: %s. The former names are still read.", where, "; ".join(renamed))
        for section in SECTIONS:
            if section in values and section != task and (section, task) != ("tokens", "lora"):
                raise CascadeError(f"{section} does not belong to `cascade train {task}`; remove it.")
        if "task" in values:
            raise CascadeError("'task' is not a setting; it is the command's: `cascade train lora`.")
        return build(Settings, {**values, "task": task})
    except CascadeError as error:
        raise CascadeError(f"{where}: {error}") from None


def with_current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values by the keys' current names, a phrase for each key that was renamed).

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
    return current, renamed


def resolve(settings: Settings, folder: Path, find_model: Callable[[str, str], Path]) -> Settings:
    """Make paths absolute: files and folders relative to `folder`, networks by find_model(role, name)."""

    def at(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    data = dataclasses.replace(
        settings.data,
        folder=at(settings.data.folder) if settings.data.folder else None,
        tars=tuple(map(at, settings.data.tars)),
        cache=at(settings.data.cache) if settings.data.cache else None,
    )
    output = settings.output
    run = output.folder or f"runs/{Path(output.file).stem}"
    output = dataclasses.replace(output, file=at(output.file), folder=at(run))

    def model(role: str, name: str | None) -> str | None:
        return None if name is None else str(find_model(role, name).resolve())

    names = dataclasses.asdict(settings.models)
    files = {key: model(ROLES.get(key, key), name) for key, name in names.items()}
    control = settings.controlnet
    if settings.task == "controlnet" and control.start not in ("compressor", "random"):
        control = dataclasses.replace(control, start=model("controlnet", control.start))
    return dataclasses.replace(
        settings,
        data=data,
        output=output,
        controlnet=control,
        models=ModelSettings(**files),  # type: ignore[arg-type]
    )
