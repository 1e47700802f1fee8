"""`train`: the loop, its optimiser and its learning rate."""

from dataclasses import dataclass, field
from datetime import datetime, time
from typing import Annotated, Any, Literal, get_args

from ...errors import CascadeError, quoted
from ..ranges import Range, Share, Steps, StepsOrShare, check_ranges
from ..typed_yaml import unknown_name

OptimizerName = Literal[
    "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "lion", "prodigy", "schedulefree"
]
DIVISIBLE = ("adamw", "adamw8bit", "paged_adamw8bit", "lion")  # treat values one by one, or in small blocks


@dataclass(frozen=True)
class TrainSettings:
    """The training loop. A step has `batch_size` × `accumulate` pictures on each accelerator."""

    steps: Steps = 1000  # number of steps of the optimiser
    batch_size: Annotated[int, Range(1, 65_536)] = 4  # pictures that each accelerator computes at once
    accumulate: Annotated[int, Range(1, 65_536)] = 1  # number of such batches in a step
    # use about 1e-4 for LoRAs and ControlNets, 1e-5 for Stage C, 1e-3 for tokens
    learning_rate: Annotated[float, Range(1e-12, 10)] = 1e-4
    # number of times that all pictures are shown; replaces steps
    epochs: Annotated[float | None, Range(0, 1e6, above=True)] = None
    # how the learning rate changes: it falls as a cosine or a line, stays constant, or falls only at the end
    schedule: Literal["constant", "cosine", "linear", "stable_decay"] = "cosine"
    final_learning_rate: Share = 0.0  # learning rate at the end of the schedule, as a share of the full one
    # steps over which the learning rate rises; a number below 1 is a share of the run
    warmup: StepsOrShare = 50
    # how often a cosine or linear schedule starts again, in equal parts
    restarts: Annotated[int, Range(0, 10_000)] = 0
    # stable_decay: steps over which the learning rate falls at the end; a number below 1 is a share of the run
    decay: StepsOrShare = 0.2
    # one of these names, or module.Class, which `cascade train` accepts but the nodes do not
    optimizer: OptimizerName | str = "adamw"
    # arguments of the optimiser's class; not accepted by the nodes
    optimizer_arguments: dict[str, Any] = field(default_factory=dict)
    weight_decay: Annotated[float, Range(0, 10)] = 0.01  # weight decay, for optimisers that have it
    # the two betas, for optimisers that have them
    betas: Annotated[tuple[float, ...], Range(0, 1, below=True)] = (0.9, 0.99)
    max_grad_norm: Annotated[float, Range(0, 1e12)] = 1.0  # upper bound of the gradient's norm; 0: no bound
    # decay of the average of the weights, which is what the trained file holds; 0: no average
    ema: Annotated[float, Range(0, 1, below=True)] = 0.999
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0  # seed of all random numbers
    # auto: bf16 on an accelerator, or fp16 on one without bf16; fp32 on the processor
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # precision of the frozen network's large weights; full is the precision in which it computes
    base_weights: Literal["full", "int8", "nf4"] = "full"
    # computes activations again in the backward pass, to save memory; null: only if Stage C is large
    gradient_checkpointing: bool | None = None
    compile: bool = False  # compiles the blocks by torch.compile
    stop_at: str | None = None  # a time of day such as '07:30' at which the run stops, or a date and a time
    # hours after which the run stops
    stop_after: Annotated[float | None, Range(0, 100_000, above=True)] = None
    # finetune: each process holds only its part of the network, of the optimiser's state and of the average
    # (FSDP2)
    fsdp: bool = False
    # on an accelerator, records CUDA graphs; not for a finetune, since its network has dropout
    cuda_graphs: bool = True
    deterministic: bool = True  # gives the same bits each time; false is somewhat faster

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
        if self.stop_at is not None:
            _check_time(self.stop_at)
        if self.fsdp and self.optimizer not in DIVISIBLE:
            raise CascadeError(
                f"train.fsdp divides every tensor among the processes, which {quoted(self.optimizer)} would not see as "
                f"a whole; choose one of {', '.join(DIVISIBLE)}."
            )
        if self.fsdp and self.precision == "fp16":
            raise CascadeError(
                "train.fsdp trains in bf16 or fp32, not in fp16; set train.precision to one of them."
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise CascadeError(
                f"train.learning_rate is {quoted(self.learning_rate)}, but prodigy finds the rate itself, times "
                "this; give 1."
            )
        if self.restarts and self.schedule not in ("cosine", "linear"):
            raise CascadeError(
                f"train.restarts is {self.restarts}, but {self.schedule} has none; choose cosine or linear."
            )


def _check_time(text: str) -> None:
    try:
        (time if len(text) <= 5 else datetime).fromisoformat(text if len(text) != 4 else f"0{text}")
    except ValueError:
        raise CascadeError(
            f"train.stop_at is {quoted(text)}; a time of day such as '07:30' is expected, or '2030-01-31 07:30'."
        ) from None


def check_optimizer_name(name: str) -> None:
    """Raises CascadeError for what is neither a known optimiser nor spelled as `module.Class`."""
    spelled = len(name) <= 200 and "." in name and all(part.isidentifier() for part in name.split("."))
    if name not in get_args(OptimizerName) and not spelled:
        raise CascadeError(unknown_name(f"train.optimizer is {quoted(name)}", name, get_args(OptimizerName)))
