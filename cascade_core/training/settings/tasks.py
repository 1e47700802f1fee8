"""`lora`, `controlnet`, `finetune` and `tokens`: each belongs to the task of its name."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ...errors import CascadeError, printable, quoted
from ...hints.kinds import KindName
from ..ranges import Range, RateFactor, Share, check_ranges
from ..typed_yaml import build

TaskName = Literal["lora", "controlnet", "finetune", "tokens"]
Reads = Literal["small", "enlarged"]
Network = Literal["stage_c", "stage_b", "text_encoder"]


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

    Layers that match a pattern of `ranks` or `rates` have that rank, or the learning rate times that factor.
    """

    # the network that it changes; text_encoder: that alone
    network: Network = "stage_c"
    # loha and lokr store changes of higher rank in fewer numbers
    algorithm: Literal["lora", "loha", "lokr"] = "lora"
    dora: bool = False  # rows' magnitudes are learned apart from their directions
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead of alpha / rank
    factor: Annotated[int | None, Range(2, 16_384)] = None  # lokr: largest number of rows of its small matrix
    start: str | None = None  # the file of a LoRA to go on from
    # by pattern of layers
    ranks: dict[str, Any] = field(default_factory=dict)
    # by pattern of layers, as multiples of the learning rate
    rates: dict[str, Any] = field(default_factory=dict)
    up_learning_rate: RateFactor = 1.0  # LoRA+: of `up`, as a multiple of the learning rate; 16 is published
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of the values between down and up
    rank_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of ranks; of loha and lokr, of rows
    module_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # of whole layers' changes
    # its capacity: 4 to 8 for a style, 16 to 64 for objects
    rank: Annotated[int, Range(1, 16_384)] = 16
    alpha: Annotated[float | None, Range(1e-6, 1e6)] = None  # null: the rank
    # which layers
    targets: tuple[str, ...] = ("all",)
    # whether the text encoder is trained together with Stage C
    text_encoder: bool = False
    text_learning_rate: RateFactor = 0.5  # as a share of the learning rate
    token_learning_rate: RateFactor = 5.0  # the same, for `tokens` that the LoRA learns too
    # of the file, as in docs/tasks/lora.md
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

    # the kind of hint that is computed from the pictures
    hint: KindName = "canny"
    # its initial weights
    start: str = "compressor"
    # differences from the published configuration
    config: dict[str, Any] = field(default_factory=dict)
    # super_resolution: ratio of the sides of the picture to those of the small one
    scale: Annotated[float, Range(1, 16)] = 2.0
    # super_resolution: the compressor reads the small picture, as published, or the enlarged one
    reads: Reads = "small"

    def __post_init__(self) -> None:
        check_ranges(self, "controlnet")


@dataclass(frozen=True)
class FinetuneSettings:
    """`modules`: all, or patterns of the network's modules, such as `up_blocks.1.*`."""

    # the network that is trained
    network: Network = "stage_c"
    # which of its modules
    modules: tuple[str, ...] = ("all",)
    # of Stage C or B: bounds of the trained blocks, as shares of the forward pass, whose first block is at 0
    depth: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 1.0)
    text_encoder: bool = False  # whether the whole text encoder is trained together with Stage C
    text_learning_rate: RateFactor = 0.1  # as a share of the learning rate
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the file

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
    """Training of Stage B, conditioned on the compressor's latent of each picture at one of several sizes.

    All latents that can be drawn are made beforehand and kept.
    """

    # sizes of the compressor's pictures, as factors of a picture's sides; null: any from 0.5 to 1, as published
    scales: Annotated[tuple[float, ...] | None, Range(0.1, 1)] = None
    # share of rows that are trained without the compressor's latent, which guidance needs
    dropout: Share = 0.1
    # most noise added to the compressor's latent, to prepare for latents from Stage C
    noise: Annotated[float, Range(0, 10)] = 0.0
    pyramid_noise: bool = True  # noise of coarser sizes too, as published

    def __post_init__(self) -> None:
        check_ranges(self, "stage_b")
        if self.scales is not None and not 1 <= len(self.scales) <= 32:
            raise CascadeError(
                f"stage_b.scales has {len(self.scales)} numbers; give 1 to 32, such as [0.75]."
            )


@dataclass(frozen=True)
class TokenSettings:
    """A token to learn: its name (`blob` is [blob] in captions), its initial words, and its number of vectors."""

    # its name in captions and prompts; mycat is written [mycat]
    name: str
    # words whose vectors it starts from, close in meaning to the new token
    initial: str = ""
    vectors: Annotated[int, Range(1, 75)] = 1  # as many as a prompt's chunk holds
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
