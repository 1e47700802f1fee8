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
    """A picture to make while training. Null means the common value: for the seed, the run's plus the prompt's number;
    for the size, data.size."""

    # text of the picture
    prompt: str
    # text of what it should not show
    negative: str = ""
    # null: the run's plus the prompt's number
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    # width and height in pixels, or one number for both
    size: Annotated[tuple[int, ...] | None, Range(64, 4096)] = None
    # null: output.sample_steps
    steps: Annotated[int | None, Range(1, 10_000)] = None
    # null: output.sample_cfg
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
    """`file` is the run's result; `folder` holds its checkpoint, log, curve and samples (null: runs/NAME)."""

    # the run's result; its name ends in .safetensors
    file: str
    # for checkpoint, log, curve and samples; null: runs/NAME
    folder: str | None = None
    # steps
    log_every: Steps = 10
    # steps, or epochs such as `1 epoch`
    checkpoint_every: Annotated[int | str, StepsOrEpochs(1, 100_000_000)] = 500
    sample_every: Every = 0  # likewise; 0 is never
    save_every: Every = 0  # likewise; writes the file's current state into the folder
    keep_last: Annotated[int | None, Range(1, 100_000)] = None  # number of those that are kept; null: all
    raw: bool = False  # whether the last step's weights are written as well as their average
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = ()  # other programs that log the numbers
    # of the samples
    prompts: tuple[str | SamplePrompt, ...] = ()
    prompts_file: str | None = None  # more of them
    # how samples are made
    sample_steps: Annotated[int, Range(1, 10_000)] = 20
    # guidance of samples
    sample_cfg: Annotated[float, Range(-1000, 1000)] = 4.0
    # of samples
    sample_shift: Annotated[float, Range(0.001, 1000)] = 2.0
    # of samples
    sample_sampler: Literal["ddpm", "ddim", "lcm", "dpmpp_2m"] = "ddpm"
    about: dict[str, Any] = field(default_factory=dict)  # metadata of the file, by the names in ABOUT
    captions_in_file: bool = False  # whether its metadata holds the captions' tags and the folders' names

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
