"""The settings of a training run: one YAML file, read into frozen dataclasses. This file lists all keys.

    data: {folder: pictures}
    train: {steps: 2000}
    output: {file: my_style.safetensors}

is a whole file. Paths are relative to it; networks go by the names that the loaders offer.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..errors import CascadeError, printable, quoted
from ..hints.kinds import KindName
from .ranges import Range, check_ranges
from .typed_yaml import build, read_yaml, unknown_name

logger = logging.getLogger(__name__)

TaskName = Literal["lora", "controlnet", "finetune", "tokens"]
Reads = Literal["small", "enlarged"]
Weighting = Literal[
    "p2", "adaptive", "debiased", "constant", "min_snr_gamma", "sech", "x0_snr", "x0_snr_plus_one", "x0_min_snr",
    "x0_min_snr_plus_one", "x0_truncated_snr", "x0_sigmoid",
]  # fmt: skip

ABOUT = (  # entries of ModelSpec that a person gives
    "title", "author", "description", "trigger_phrase", "usage_hint", "tags", "license", "date"
)  # fmt: skip
MAX_ABOUT = 4096
MAX_PROMPTS = 64
MAX_SETS = 100

# Ranges that several numbers have
Share = Annotated[float, Range(0, 1)]
Steps = Annotated[int, Range(1, 100_000_000)]
RateFactor = Annotated[float, Range(0, 10_000, above=True)]  # by which the learning rate is multiplied
StepsOrShare = Annotated[int | float, Range(0, 100_000_000)]  # steps; below 1 a share of the run's

OptimizerName = Literal[
    "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "lion", "prodigy", "schedulefree"
]


@dataclass(frozen=True)
class ModelSettings:
    """Networks by file name. `image_encoder` encodes image prompts.

    Samples are decoded by `stage_b` and `stage_a`, or else by `previewer`; where none is named, by the published ones
    that are found.
    """

    stage_c: str = "stage_c_bf16.safetensors"
    text_encoder: str = "stable_cascade_text_encoder.safetensors"
    compressor: str = "effnet_encoder.safetensors"
    stage_b: str | None = None
    stage_a: str | None = None
    previewer: str | None = None
    image_encoder: str | None = None


@dataclass(frozen=True)
class DataSetSettings:
    """One of several sets. `weight`: of its pictures in the loss, as regularisation pictures have less than 1."""

    folder: str | None = None
    tars: tuple[str, ...] = ()
    repeat: Annotated[int, Range(1, 10_000)] = 1  # times data.repeat
    weight: Annotated[float, Range(0, 1000)] = 1.0
    trigger: str | None = None  # words before each of its captions; null: data.trigger

    def __post_init__(self) -> None:
        check_ranges(self, "data.sets")
        if self.folder is None and not self.tars:
            raise CascadeError("data.sets: a set has neither a folder nor tars; name one of them.")


@dataclass(frozen=True)
class DataSettings:
    """Where pictures come from, and how they are shown."""

    folder: str | None = None  # of pictures with captions, subfolders too
    tars: tuple[str, ...] = ()  # webdataset tars: paths or patterns
    sets: tuple[DataSetSettings, ...] = ()  # more of them, each shown and weighed in its own way
    # pixels as generated: a picture's area is at most size²; 1024 gives latents of 24 × 24
    size: Annotated[int, Range(64, 4096)] = 1024
    bucket_step: int = 64  # pixels; sides of the buckets are multiples of it
    caption_dropout: Share = 0.05  # the share of rows that are trained without words
    image_prompt_dropout: Share = 0.05  # the same without their image prompts, chosen apart from the words
    flip: bool = False  # half of the rows are mirrored
    cache: str | None = None  # folder where latents are kept between runs
    repeat: Annotated[int, Range(1, 10_000)] = 1  # how often an epoch shows each picture
    # Which pictures are left out: by their shorter side in pixels; by how many times they would be enlarged (1: all
    # that are smaller than their bucket); by the share of their area that would be cropped. null and 1: none are.
    min_side: Annotated[int, Range(16, 65_536)] = 16
    max_enlarge: Annotated[float | None, Range(1, 10_000)] = None
    max_crop: Share = 1.0
    enlarge: bool = True  # false: a picture smaller than its bucket goes into one of its own size
    max_aspect: Annotated[float, Range(1, 16)] = 2.5  # of the buckets: what is longer is cropped to it
    # What is trained of captions: words before each; tags, which stand between separators, in another order and some of
    # them left out, but for the first keep_tags; so many variants of each caption are drawn beforehand and encoded
    trigger: str = ""
    shuffle_tags: bool = False
    keep_tags: Annotated[int, Range(0, 1000)] = 0
    tag_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    tag_separator: str = ","
    caption_variants: Annotated[int, Range(1, 64)] = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "tars", (self.tars,) if isinstance(self.tars, str) else tuple(self.tars))
        check_ranges(self, "data")
        if not self.tag_separator.strip() or len(self.tag_separator) > 16:
            raise CascadeError(
                f"data.tag_separator is {quoted(self.tag_separator)}; a sign such as , or ; is expected."
            )
        for trigger in (self.trigger, *(each.trigger or "" for each in self.sets)):
            if len(trigger) > 500:
                raise CascadeError(f"data.trigger is {quoted(trigger)}; at most 500 characters are expected.")
        if len(self.sets) > MAX_SETS:
            raise CascadeError(f"data.sets has {len(self.sets)} entries; give at most {MAX_SETS}.")
        if self.folder is None and not self.tars and not self.sets:
            raise CascadeError("The training data has neither a folder nor tars; name one of them.")
        if not 8 <= self.bucket_step <= self.size:
            raise CascadeError(
                f"data.bucket_step is {quoted(self.bucket_step)}; it must lie within 8 and the size, {self.size}."
            )


@dataclass(frozen=True)
class TrainSettings:
    """The loop. A batch is `batch_size` pictures on each accelerator, `accumulate` times a step."""

    steps: Steps = 1000
    batch_size: Annotated[int, Range(1, 65_536)] = 4
    accumulate: Annotated[int, Range(1, 65_536)] = 1
    learning_rate: Annotated[float, Range(1e-12, 10)] = 1e-4
    epochs: Annotated[float | None, Range(0, 1e6, above=True)] = None  # instead of steps
    schedule: Literal["constant", "cosine", "linear", "stable_decay"] = "cosine"
    final_learning_rate: Share = 0.0  # where the schedule ends, as a share of the learning rate
    warmup: StepsOrShare = 50
    restarts: Annotated[int, Range(0, 10_000)] = 0  # how often cosine or linear begins anew, in equal parts
    decay: StepsOrShare = 0.2  # of stable_decay: how long it falls at its end
    optimizer: OptimizerName | str = "adamw"  # or module.Class, in a settings file of the command line alone
    optimizer_arguments: dict[str, Any] = field(default_factory=dict)  # in such a file alone, too
    weight_decay: Annotated[float, Range(0, 10)] = 0.01
    betas: Annotated[tuple[float, ...], Range(0, 1, below=True)] = (0.9, 0.99)
    max_grad_norm: Annotated[float, Range(0, 1e12)] = 1.0  # of the gradient; 0 is none
    # of the average that is written; 0 writes the last weights
    ema: Annotated[float, Range(0, 1, below=True)] = 0.999
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    # auto: on an accelerator bf16, or fp16 where it does not compute in bf16; on the processor fp32
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool | None = None  # null: where Stage C is large
    compile: bool = False
    cuda_graphs: bool = True  # on an accelerator, where a step draws nothing at random within the network
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        if len(self.betas) != 2:
            raise CascadeError(f"train.betas is {quoted(list(self.betas))}; two numbers are expected.")
        for name in ("warmup", "decay"):
            if (value := getattr(self, name)) >= 1 and value != int(value):
                raise CascadeError(
                    f"train.{name} is {quoted(value)}; whole steps, or a share of the run below 1, are expected."
                )
        check_optimizer_name(self.optimizer)
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise CascadeError(
                f"train.learning_rate is {quoted(self.learning_rate)}, but prodigy finds the rate itself, times "
                "this; give 1."
            )
        if self.restarts and self.schedule not in ("cosine", "linear"):
            raise CascadeError(
                f"train.restarts is {self.restarts}, but {self.schedule} has none; choose cosine or linear."
            )


def check_optimizer_name(name: str) -> None:
    """Raise CascadeError for what is neither a known optimiser nor spelled as `module.Class`."""
    spelled = len(name) <= 200 and "." in name and all(part.isidentifier() for part in name.split("."))
    if name not in get_args(OptimizerName) and not spelled:
        raise CascadeError(unknown_name(f"train.optimizer is {quoted(name)}", name, get_args(OptimizerName)))


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network learns to predict. The defaults are the published ones.

    diffusion     the noise, at uniform times, the error weighed by `weighting` of the log-SNR
    consistency   the end of its own guided path in one step, for few steps of the `lcm` sampler (LoRA alone)
    """

    kind: Literal["diffusion", "consistency"] = "diffusion"
    weighting: Weighting | None = None  # null: p2; for consistency, which begins at pure noise, debiased
    snr_gamma: Annotated[float, Range(0, 1e6, above=True)] = 5.0  # of min_snr_gamma
    max_loss_weight: Annotated[float | None, Range(0, 1e9, above=True)] = None
    pure_noise_share: Share = 0.0  # of a batch that is trained at pure noise
    # of the schedule that times are drawn from; above 1 is more noise
    shift: Annotated[float, Range(0.001, 1000)] = 1.0
    # diffusion: the bounds of the times that are drawn; 0 is the picture, 1 pure noise
    t_range: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 1.0)
    noise_offset: Share = (
        0.0  # of noise that is one number for each channel, so that brightness is learned too
    )
    multires_noise: Share = 0.0  # how strong noise of half the size is, that of a quarter with its square, …
    # the error from which on it counts as its amount and no longer as its square; null: never
    huber: Annotated[float | None, Range(0, 1e6, above=True)] = None
    # consistency: the teacher's cfg; of two bounds, another for each picture
    guidance: Annotated[tuple[float, ...], Range(-1000, 1000)] = (4.0,)
    cfg_rescale: Share = 0.7
    # consistency: into how many steps the teacher's path is cut
    solver_steps: Annotated[int, Range(2, 10_000)] = 50
    sampling_steps: int | None = None  # consistency: for so many steps of `lcm` alone; null: for any number
    # consistency: the share of a batch that begins from the student's own last step
    on_policy_share: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
        if len(self.t_range) != 2 or not self.t_range[0] < self.t_range[1]:
            raise CascadeError(
                f"objective.t_range is {quoted(list(self.t_range))}; two times, the smaller first, are expected."
            )
        if self.pure_noise_share and self.t_range[1] < 1:
            raise CascadeError(
                f"objective.pure_noise_share is {self.pure_noise_share} at t = 1, but t_range ends at "
                f"{self.t_range[1]}; set one of them back."
            )
        if self.kind == "consistency" and (
            self.t_range != (0.0, 1.0) or self.noise_offset or self.multires_noise or self.huber is not None
        ):
            raise CascadeError(
                "objective.t_range, noise_offset, multires_noise and huber are of the kind diffusion; leave them out."
            )
        if len(self.guidance) not in (1, 2):
            raise CascadeError(
                f"objective.guidance is {quoted(list(self.guidance))}; one number or two bounds are expected."
            )
        steps = self.sampling_steps
        if steps is not None and not (1 <= steps <= self.solver_steps and self.solver_steps % steps == 0):
            raise CascadeError(
                f"objective.sampling_steps is {quoted(steps)}; solver_steps ({self.solver_steps}) must be a multiple "
                "of it."
            )

    @property
    def loss_weight(self) -> Weighting:
        return self.weighting or ("debiased" if self.kind == "consistency" else "p2")


@dataclass(frozen=True)
class _Rank:
    value: Annotated[int, Range(1, 16_384)]

    def __post_init__(self) -> None:
        check_ranges(self, "lora.ranks")


@dataclass(frozen=True)
class _Rate:
    value: RateFactor

    def __post_init__(self) -> None:
        check_ranges(self, "lora.rates")


@dataclass(frozen=True)
class LoRASettings:
    """`targets`: all (linear layers and 1×1 convolutions), attention, or patterns such as `up_blocks.*to_q`.

    Layers that match a pattern of `ranks` or `rates` have another rank, or so many times the learning rate.
    """

    algorithm: Literal["lora", "loha", "lokr"] = "lora"
    dora: bool = False  # rows' magnitudes are learned apart from their directions
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead of alpha / rank
    factor: Annotated[int | None, Range(2, 16_384)] = None  # lokr: at most so many rows of its small matrix
    start: str | None = None  # the file of a LoRA to go on from
    ranks: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    up_learning_rate: RateFactor = 1.0  # LoRA+: of `up`, as a multiple of the learning rate; 16 is published
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of the values between down and up
    rank_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of ranks; of loha and lokr, of rows
    module_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of whole layers' changes
    rank: Annotated[int, Range(1, 16_384)] = 16
    alpha: Annotated[float | None, Range(1e-6, 1e6)] = None  # null: the rank
    targets: tuple[str, ...] = ("all",)
    text_encoder: bool = False
    text_learning_rate: RateFactor = 0.5  # as a share of the learning rate
    token_learning_rate: RateFactor = 5.0  # the same for `tokens`, which a LoRA may learn with it
    dialect: str = "kohya"
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"  # of the file

    def __post_init__(self) -> None:
        check_ranges(self, "lora")
        for key, kind in (("ranks", _Rank), ("rates", _Rate)):
            for pattern, value in getattr(self, key).items():
                build(kind, {"value": value}, f"lora.{key}.{printable(pattern)}")
        if self.algorithm != "lora" and (self.dropout or self.up_learning_rate != 1):
            raise CascadeError(
                f"lora.dropout and lora.up_learning_rate are of the algorithm lora; {self.algorithm} has rank_dropout, "
                "module_dropout and rates."
            )
        if not self.targets:
            raise CascadeError(
                "lora.targets is empty, so nothing would be trained; give all, attention, or patterns."
            )


@dataclass(frozen=True)
class ControlNetSettings:
    """`start`: compressor (its backbone's weights), random, or the file of a ControlNet to go on from.

    `config` gives what differs from the published one: proj_blocks, bottleneck_mode, stem, stages, c_last, …
    """

    hint: KindName = "canny"
    start: str = "compressor"
    config: dict[str, Any] = field(default_factory=dict)
    # super_resolution: how many times smaller the small picture is, a side
    scale: Annotated[float, Range(1, 16)] = 2.0
    reads: Reads = (
        "small"  # super_resolution: what the compressor reads, as published, or the picture enlarged
    )

    def __post_init__(self) -> None:
        check_ranges(self, "controlnet")


@dataclass(frozen=True)
class FinetuneSettings:
    """`modules`: all, or patterns of Stage C's modules, such as `up_blocks.1.*`."""

    modules: tuple[str, ...] = ("all",)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the file

    def __post_init__(self) -> None:
        if not self.modules:
            raise CascadeError(
                "finetune.modules is empty, so nothing would be trained; give all, or patterns."
            )


@dataclass(frozen=True)
class TokenSettings:
    """A token to learn: its name (`blob` is [blob] in captions), words that it begins as, how many vectors it has."""

    name: str
    initial: str = ""
    vectors: Annotated[int, Range(1, 75)] = 1  # as many as a prompt's chunk holds

    def __post_init__(self) -> None:
        check_ranges(self, "tokens")
        name = self.name
        if not name.strip("[]<> ") or len(name) > 100 or not name.isprintable() or set(name) & set("()\\"):
            raise CascadeError(
                f"tokens.name is {quoted(name)}; a token's name is a word or a few, such as [blob], at most 100 "
                "characters and without parentheses, which weigh words in prompts."
            )


@dataclass(frozen=True)
class SamplePrompt:
    """A picture to make while training. What is null is as it is for all: the seed that of the run, one more for each
    prompt; the size data.size."""

    prompt: str
    negative: str = ""
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    size: Annotated[tuple[int, ...] | None, Range(64, 4096)] = (
        None  # width and height in pixels, or one for both
    )
    steps: Annotated[int | None, Range(1, 10_000)] = None
    cfg: Annotated[float | None, Range(-1000, 1000)] = None

    def __post_init__(self) -> None:
        check_ranges(self, "output.prompts")
        if self.size is not None and (len(self.size) not in (1, 2) or any(side % 8 for side in self.size)):
            raise CascadeError(
                f"output.prompts.size is {quoted(list(self.size))}; width and height in multiples of 8 are expected, "
                "as [512, 768]."
            )


def check_prompt_count(prompts: Sequence[Any], where: str = "output.prompts") -> None:
    if len(prompts) > MAX_PROMPTS:
        raise CascadeError(
            f"{where} has {len(prompts)} entries; at most {MAX_PROMPTS} stand side by side in a sample."
        )


@dataclass(frozen=True)
class OutputSettings:
    """`file` is what the run gives; `folder` holds its checkpoint, log, curve and samples (null: runs/NAME)."""

    file: str
    folder: str | None = None
    log_every: Steps = 10
    checkpoint_every: Steps = 500
    sample_every: Annotated[int, Range(0, 100_000_000)] = 0  # 0 is never
    prompts: tuple[str | SamplePrompt, ...] = ()
    prompts_file: str | None = None  # more of them
    sample_steps: Annotated[int, Range(1, 10_000)] = 20
    sample_cfg: Annotated[float, Range(-1000, 1000)] = 4.0
    sample_shift: Annotated[float, Range(0.001, 1000)] = 2.0
    sample_sampler: Literal["ddpm", "ddim", "lcm", "dpmpp_2m"] = "ddpm"
    about: dict[str, Any] = field(default_factory=dict)  # what the file says of itself, of ABOUT
    captions_in_file: bool = False  # whether it tells the captions' tags and the folders' names

    def __post_init__(self) -> None:
        check_ranges(self, "output")
        for key, value in self.about.items():
            if key not in ABOUT:
                raise CascadeError(unknown_name(f"output.about holds {quoted(key)}", key, ABOUT))
            if not (isinstance(value, str) and len(value) <= MAX_ABOUT):
                raise CascadeError(
                    f"output.about.{key} is {quoted(value)}; a text of at most {MAX_ABOUT:,} characters is expected."
                )
        check_prompt_count(self.prompts)


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
        if self.train.optimizer == "prodigy" and len(rates := self.rate_factors()) > 1:
            raise CascadeError(
                f"prodigy has one rate for all that is trained, but here are several ({', '.join(sorted(rates))} of "
                "it); give 1 for each, or choose another optimizer."
            )
        if self.objective.kind == "consistency" and self.task != "lora":
            raise CascadeError("objective.kind consistency trains a LoRA; use `cascade train lora`.")
        if self.objective.kind == "consistency" and any(each.weight != 1 for each in self.data.sets):
            raise CascadeError(
                "objective.kind consistency weighs all pictures alike; leave weight out of data.sets."
            )
        if self.objective.kind == "consistency" and (self.lora.text_encoder or self.tokens):
            raise CascadeError(
                "objective.kind consistency trains Stage C alone; leave text_encoder and tokens out."
            )
        if self.output.sample_every and not (self.output.prompts or self.output.prompts_file):
            raise CascadeError(
                "output.sample_every makes pictures of output.prompts; give them, or leave it at 0."
            )
        if (self.models.stage_b is None) != (self.models.stage_a is None):
            raise CascadeError(
                "models.stage_b and models.stage_a make samples together; give both, or neither."
            )
        sized = any(isinstance(each, SamplePrompt) and each.size for each in self.output.prompts)
        if self.task == "controlnet" and sized:
            raise CascadeError(
                "output.prompts: the samples of a ControlNet have the size of its hints; leave size out."
            )

    def rate_factors(self) -> set[str]:
        """The shares of the learning rate that parts of what is trained have."""
        if self.task != "lora":
            return {"1"}
        lora = self.lora
        text = {f"{lora.text_learning_rate:g}"} if lora.text_encoder else set()
        layers = {f"{float(rate):g}" for rate in lora.rates.values()}
        ups = {f"{lora.up_learning_rate:g}"}
        return {"1", *layers, *ups, *text, *({f"{lora.token_learning_rate:g}"} if self.tokens else ())}

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


ROLES = {"image_encoder": "vision"}  # as the loaders call what `models` names otherwise
DECODERS = {  # published files that decode samples where no network for that is named, the first that is found
    "stage_b": tuple(f"stage_b{size}.safetensors" for size in ("_bf16", "", "_lite_bf16", "_lite")),
    "stage_a": ("stage_a.safetensors",),
    "previewer": ("previewer.safetensors",),
}
SECTIONS = ("lora", "controlnet", "finetune", "tokens")  # each is of the task of its name
FORMER_NAMES = {  # of keys, by section: still read
    "train": {"clip_norm": "max_grad_norm"},
    "objective": {
        "largest_weight": "max_loss_weight",
        "share_at_start": "pure_noise_share",
        "own_path": "on_policy_share",
    },
}


FORMER_VALUES = {  # of keys, by section: what were weights for an error in x0, without saying so
    "objective": {
        "weighting": {
            name: f"x0_{name}"
            for name in ("snr", "snr_plus_one", "min_snr", "min_snr_plus_one", "truncated_snr", "sigmoid")
        }
    }
}


def read_settings(path: Path, task: TaskName) -> Settings:
    """Read the settings of a YAML file. Raises CascadeError with the file's name for whatever is wrong in it.

    It is the user's own: any optimiser may be named in it.
    """
    return settings_of(read_yaml(path), task, str(path), any_optimizer=True)


def settings_of(
    values: Mapping[str, Any], task: TaskName, where: str, any_optimizer: bool = False
) -> Settings:
    """Build settings from a file's values. where: the file's name, for messages.

    any_optimizer: whether the values may name a class that is imported and called with arguments; never for values
    that another than the user can give, such as a client of a server.
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
        settings = build(Settings, {**values, "task": task})
        if not any_optimizer:
            _check_no_class(settings.train)
        return settings
    except CascadeError as error:
        raise CascadeError(f"{where}: {error}") from None


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
    """Read what `Settings.as_json` gave, also under former names; None where it is something else."""
    try:
        values, _ = with_current_names(json.loads(text))
        return build(Settings, values)
    except (ValueError, TypeError, RecursionError):  # CascadeError among them
        return None


def with_current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values by the keys' current names, a phrase for each key and each value that was renamed).

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


def _decoders(
    names: Mapping[str, str | None], find_model: Callable[[str, str], Path]
) -> dict[str, str | None]:
    """The networks that decode samples: those that are named, or the published ones that are found.

    Raises CascadeError where there is none.
    """
    if any(names[key] for key in DECODERS):
        return {}

    def found(key: str) -> str | None:
        for name in DECODERS[key]:
            with suppress(CascadeError):
                find_model(key, name)
                return name
        return None

    stages = {"stage_b": found("stage_b"), "stage_a": found("stage_a")}
    chosen = stages if all(stages.values()) else {"previewer": found("previewer")}
    if not all(chosen.values()):
        raise CascadeError(
            "output.sample_every makes pictures by models.stage_b and models.stage_a, or by models.previewer, and none "
            "is named or found; name them, run `cascade fetch previewer`, or leave it at 0."
        )
    return chosen


def resolve(settings: Settings, folder: Path, find_model: Callable[[str, str], Path]) -> Settings:
    """Make paths absolute: files and folders relative to `folder`, networks by find_model(role, name)."""

    def at(path: str) -> str:
        # os.path raises neither for an unknown ~user nor for links in a circle; whoever opens the file says so
        return os.path.realpath(folder / os.path.expanduser(path))

    data = dataclasses.replace(
        settings.data,
        folder=at(settings.data.folder) if settings.data.folder else None,
        tars=tuple(map(at, settings.data.tars)),
        sets=tuple(
            dataclasses.replace(
                each, folder=at(each.folder) if each.folder else None, tars=tuple(map(at, each.tars))
            )
            for each in settings.data.sets
        ),
        cache=at(settings.data.cache) if settings.data.cache else None,
    )
    output = settings.output
    run = output.folder or f"runs/{Path(output.file).stem}"
    prompts_file = at(output.prompts_file) if output.prompts_file else None
    output = dataclasses.replace(output, file=at(output.file), folder=at(run), prompts_file=prompts_file)

    def model(role: str, name: str | None) -> str | None:
        return None if name is None else os.path.realpath(find_model(role, name))

    names = dataclasses.asdict(settings.models)
    if output.sample_every:
        names |= _decoders(names, find_model)
    files = {key: model(ROLES.get(key, key), name) for key, name in names.items()}
    control = settings.controlnet
    if settings.task == "controlnet" and control.start not in ("compressor", "random"):
        control = dataclasses.replace(control, start=model("controlnet", control.start))
    lora = dataclasses.replace(settings.lora, start=model("lora", settings.lora.start))
    return dataclasses.replace(
        settings,
        data=data,
        output=output,
        controlnet=control,
        lora=lora,
        models=ModelSettings(**files),  # type: ignore[arg-type]
    )
