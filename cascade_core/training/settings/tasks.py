"""`lora`, `controlnet`, `finetune` and `tokens`: each belongs to the task of its name."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ...errors import CascadeError, quoted
from ...hints.kinds import KindName
from ..ranges import Range, RateFactor, Share, check_ranges

TaskName = Literal["lora", "controlnet", "finetune", "tokens"]
Reads = Literal["small", "enlarged"]
Network = Literal["stage_c", "stage_b", "text_encoder"]


@dataclass(frozen=True)
class LoRASettings:
    """`targets` is all (linear layers and 1×1 convolutions), attention, or patterns such as `up_blocks.*to_q`.

    `ranks` and `rates` map such patterns to a rank, or to a factor of the learning rate.
    """

    network: Network = "stage_c"  # the network that the LoRA changes; text_encoder: only the text encoder
    # loha and lokr store changes of higher rank in fewer numbers
    algorithm: Literal["lora", "loha", "lokr"] = "lora"
    dora: bool = False  # DoRA: the magnitude of each row is learned apart from its direction
    rslora: bool = False  # scales by alpha / sqrt(rank) instead of alpha / rank
    # lokr: largest number of rows of its small matrix; null: about the square root of the layer's rows
    factor: Annotated[int | None, Range(2, 16_384)] = None
    start: str | None = None  # a LoRA file to go on from
    # other ranks for some layers, by pattern
    ranks: Annotated[dict[str, int], Range(1, 16_384)] = field(default_factory=dict)
    # multiples of the learning rate for some layers, by pattern
    rates: Annotated[dict[str, float], Range(0, 10_000, above=True)] = field(default_factory=dict)
    # LoRA+: learning rate of the matrix `up`, as a multiple of the usual one; LoRA+ was published with 16
    up_learning_rate: RateFactor = 1.0
    # share of the values between the matrices `down` and `up` that is left out in a step
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    # share of the ranks that is left out in a step; with loha and lokr, of the rows
    rank_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    # share of the layers that is left out in a step
    module_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    # how much the LoRA can hold: 4 to 8 for a style, 16 to 64 for objects
    rank: Annotated[int, Range(1, 16_384)] = 16
    # scales the effect of the LoRA; null: the same as rank
    alpha: Annotated[float | None, Range(1e-6, 1e6)] = None
    targets: tuple[str, ...] = ("all",)  # the layers that the LoRA changes
    text_encoder: bool = False  # also trains the text encoder, together with Stage C
    text_learning_rate: RateFactor = 0.5  # learning rate of the text encoder, as a multiple of the usual one
    token_learning_rate: RateFactor = 5.0  # learning rate of `tokens`, as a multiple of the usual one
    dialect: str = "kohya"  # the names in the trained file, as in docs/tasks/lora.md
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"  # precision of the trained file

    def __post_init__(self) -> None:
        check_ranges(self, "lora")
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
    """`start` is compressor (the backbone starts with its weights), random, or the file of a ControlNet to go on from.

    `config` holds what differs from the published configuration: proj_blocks, bottleneck_mode, stem, stages, c_last, …
    """

    hint: KindName = "canny"  # the kind of hint; it is computed from the pictures
    start: str = "compressor"  # the initial weights
    config: dict[str, Any] = field(default_factory=dict)  # differences from the published configuration
    # super_resolution: how many times smaller the small picture is
    scale: Annotated[float, Range(1, 16)] = 2.0
    # super_resolution: the compressor reads the small picture, as published, or the enlarged one
    reads: Reads = "small"

    def __post_init__(self) -> None:
        check_ranges(self, "controlnet")


@dataclass(frozen=True)
class FinetuneSettings:
    """`modules` is all, or patterns of the network's modules, such as `up_blocks.1.*`."""

    network: Network = "stage_c"  # the network that is trained
    modules: tuple[str, ...] = ("all",)  # the modules that are trained
    # Stage C or B: the first and the last trained block, as shares of a forward pass; [0.5, 1] is the second
    # half
    depth: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 1.0)
    text_encoder: bool = False  # also trains the whole text encoder, together with Stage C
    text_learning_rate: RateFactor = 0.1  # learning rate of the text encoder, as a multiple of the usual one
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # precision of the trained file

    def __post_init__(self) -> None:
        check_ranges(self, "finetune")
        if len(self.depth) != 2 or not self.depth[0] < self.depth[1]:
            raise CascadeError(
                f"finetune.depth is {quoted(list(self.depth))}; two shares of the network's blocks, the smaller first, "
                "are expected, as [0.5, 1]."
            )
        if self.depth != (0.0, 1.0) and self.network == "text_encoder":
            raise CascadeError(
                "finetune.depth counts Stage C's and Stage B's blocks; for the text encoder give modules, such as "
                "text_model.encoder.layers.3*."
            )
        if not self.modules:
            raise CascadeError(
                "finetune.modules is empty, so nothing would be trained; give all, or patterns."
            )


@dataclass(frozen=True)
class StageBSettings:
    """Training of Stage B, which is given the compressor's latent of each picture.

    The compressor reads the picture at several sizes, and one of its latents is drawn in each step. All of them are
    made before the training and kept.
    """

    # sizes at which the compressor reads a picture, as factors of its sides; null: any factor from 0.5 to 1, as
    # published
    scales: Annotated[tuple[float, ...] | None, Range(0.1, 1)] = None
    # share of the pictures that is trained without the compressor's latent; guidance needs this
    dropout: Share = 0.1
    # most noise that is added to the compressor's latent, so that Stage B can also use the latents of Stage C
    noise: Annotated[float, Range(0, 10)] = 0.0
    pyramid_noise: bool = True  # adds coarser noise too, as published

    def __post_init__(self) -> None:
        check_ranges(self, "stage_b")
        if self.scales is not None and not 1 <= len(self.scales) <= 32:
            raise CascadeError(
                f"stage_b.scales has {len(self.scales)} numbers; give 1 to 32, such as [0.75]."
            )


@dataclass(frozen=True)
class TokenSettings:
    """A token to learn."""

    name: str  # its name in captions and prompts; mycat is written [mycat]
    initial: str = ""  # one or more words from whose vectors it starts; choose words close in meaning
    vectors: Annotated[int, Range(1, 75)] = 1  # number of vectors, and so how much it can hold
    start: str | None = None  # the file of a learned token to go on from, instead of initial

    def __post_init__(self) -> None:
        check_ranges(self, "tokens")
        if self.initial and self.start is not None:
            raise CascadeError(
                "tokens: start and initial both say what a token begins as; leave one of them out."
            )
        name = self.name
        if not name.strip("[]<> ") or len(name) > 100 or not name.isprintable() or set(name) & set("()\\"):
            raise CascadeError(
                f"tokens.name is {quoted(name)}; a token's name is a word or a few, such as [blob], at most 100 "
                "characters and without parentheses, which weigh words in prompts."
            )
