"""`output`: what a run writes, and the pictures that it makes on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ...errors import CascadeError, quoted
from ..ranges import Every, Range, Steps, StepsOrEpochs, check_ranges
from ..typed_yaml import unknown_name

ABOUT = (  # entries of ModelSpec that a person gives
    "title", "author", "description", "trigger_phrase", "usage_hint", "tags", "license", "date"
)  # fmt: skip
MAX_ABOUT = 4096
MAX_PROMPTS = 64


@dataclass(frozen=True)
class SamplePrompt:
    """A sample to make during the training."""

    prompt: str  # what the picture should show
    negative: str = ""  # what it should not show
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None  # null: train.seed plus the prompt's number
    # width and height in pixels, or one number for both; null: data.size
    size: Annotated[tuple[int, ...] | None, Range(64, 4096)] = None
    steps: Annotated[int | None, Range(1, 10_000)] = None  # null: output.sample_steps
    cfg: Annotated[float | None, Range(-1000, 1000)] = None  # null: output.sample_cfg

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
    """What a run writes: `file` is its result, and `folder` holds all else."""

    file: str  # the trained file; its name ends in .safetensors
    # the run's folder, with its checkpoint, log, curve and samples; null: runs/NAME
    folder: str | None = None
    log_every: Steps = 10  # how often the log gets a line, in steps
    # how often a checkpoint is written, in steps, or in epochs such as `1 epoch`
    checkpoint_every: Annotated[int | str, StepsOrEpochs(1, 100_000_000)] = 500
    sample_every: Every = 0  # how often samples are made, in steps or epochs; 0: never
    # how often the trained file is also saved in the run's folder, in steps or epochs; 0: never
    save_every: Every = 0
    # number of these saved files that are kept; null: all
    keep_last: Annotated[int | None, Range(1, 100_000)] = None
    raw: bool = False  # also writes the weights of the last step, without averaging
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()  # other programs that log the numbers
    prompts: tuple[str | SamplePrompt, ...] = ()  # prompts of the samples
    prompts_file: str | None = None  # a file with more prompts
    sample_steps: Annotated[int, Range(1, 10_000)] = 20  # steps of the samples
    sample_cfg: Annotated[float, Range(-1000, 1000)] = 4.0  # cfg of the samples
    sample_shift: Annotated[float, Range(0.001, 1000)] = 2.0  # shift of the samples
    sample_sampler: Literal["ddpm", "ddim", "lcm", "dpmpp_2m"] = "ddpm"  # sampler of the samples
    # metadata of the trained file: title, author, description, trigger_phrase, usage_hint, tags, license, date
    about: dict[str, Any] = field(default_factory=dict)
    # whether the metadata has the tags of the captions and the names of the folders
    captions_in_file: bool = False

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
