"""One frozen dataclass per network, with the published constructors' argument names and defaults.

`inference.infer_config` reads the kind and the configuration of a checkpoint back from its names and shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from types import UnionType
from typing import Any, NamedTuple, Self, get_args, get_origin, get_type_hints

from ..errors import CascadeError, printable, quoted
from ..geometry import COMPRESSOR_STRIDE

PUBLISHED_HEAD_WIDTH = 64
LARGEST = 2**31  # of any number in a configuration
MOST_BLOCKS = 1000  # residual blocks of a Stage C that a ControlNet can number; the published ones have 64


class NetworkConfig:
    """Base of all configurations. `from_dict` raises CascadeError for unknown names and values of other types."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        defaults = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(config) - set(defaults))
        if unknown:
            raise CascadeError(
                f"{cls.__name__} does not know {', '.join(map(printable, unknown[:3]))}; it takes "
                f"{', '.join(sorted(defaults))}."
            )
        values = {name: _frozen(value) for name, value in config.items()}
        for name, hint in get_type_hints(cls).items():
            if name in values and not _is_of(values[name], hint):
                raise CascadeError(
                    f"{cls.__name__}'s {name} is {quoted(config[name])}, but a value such as "
                    f"{quoted(defaults[name])} is expected; correct the config."
                )
        return cls(**values)

    @property
    def block_count(self) -> int:
        """Number of blocks that the network is built of, each of which has tensors."""
        return 0


def _frozen(value: Any, depth: int = 3) -> Any:
    """Lists as tuples, to the depth that configurations have."""
    listed = depth and isinstance(value, list | tuple)
    return tuple(_frozen(item, depth - 1) for item in value) if listed else value


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; a bool is not a number, and numbers have to be within LARGEST."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is UnionType:
        return any(_is_of(value, either) for either in get_args(hint))
    if hint is EfficientNetStage:  # `stage_table` reads it
        return isinstance(value, tuple)
    if hint in (int, float):
        return type(value) in {int, hint} and -1 <= value < LARGEST  # False for NaN
    return isinstance(value, hint)


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The arguments that Stage B and Stage C share.

    Per-level values are tuples; `blocks` and `block_repeat` hold (down, up).
    """

    c_in: int
    c_out: int
    c_r: int
    patch_size: int
    c_cond: int
    c_hidden: tuple[int, ...]
    nhead: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    block_repeat: tuple[tuple[int, ...], ...]
    level_config: tuple[str, ...]
    c_clip_seq: int
    kernel_size: int
    dropout: tuple[float, ...]
    self_attn: tuple[bool, ...]
    t_conds: tuple[str, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a published config: one `dropout` or `self_attn` serves all levels, `block_repeat` may be None."""
        full = {"self_attn": True, **config}
        widths = full.get("c_hidden", cls.c_hidden)
        levels = len(widths) if isinstance(widths, list | tuple) else 1
        for name in ("dropout", "self_attn"):
            if name in full and not isinstance(full[name], list | tuple):
                full[name] = [full[name]] * levels
        if full.get("block_repeat", ()) is None:
            full["block_repeat"] = [[1] * levels] * 2
        return super().from_dict(full)

    def __post_init__(self) -> None:
        levels = len(self.c_hidden)
        for name in ("nhead", "level_config", "dropout", "self_attn"):
            self._expect_levels(name, getattr(self, name), levels)
        for name in ("blocks", "block_repeat"):
            if len(getattr(self, name)) != 2:
                raise CascadeError(
                    f"{name} is {quoted(getattr(self, name))}, but [down, up] is expected; correct the config."
                )
            for direction in getattr(self, name):
                self._expect_levels(name, direction, levels)
        for level, kinds in enumerate(self.level_config):
            if set(kinds) - set("CTAF"):
                raise CascadeError(
                    f"level_config[{level}] is {quoted(kinds)}, but a level is made of C (ResBlock), "
                    "T (TimestepBlock), A (AttnBlock) and F (FeedForwardBlock)."
                )
            if "A" in kinds and (self.nhead[level] < 1 or self.c_hidden[level] % self.nhead[level]):
                raise CascadeError(
                    f"nhead[{level}] is {self.nhead[level]}, which does not divide c_hidden[{level}] "
                    f"= {self.c_hidden[level]}."
                )

    @property
    def block_count(self) -> int:
        count = len(self.c_hidden)
        for blocks, repeats, level_config in zip(
            self.blocks, self.block_repeat, (self.level_config, self.level_config[::-1]), strict=True
        ):
            for kinds, number, repeat in zip(level_config, blocks, repeats, strict=True):
                count += max(number, 0) * (len(kinds) + kinds.count("T") * len(self.t_conds)) + repeat
        return count

    @staticmethod
    def _expect_levels(name: str, value: tuple, levels: int) -> None:
        if len(value) != levels:
            raise CascadeError(
                f"{name} holds {len(value)} values, but c_hidden has {levels} levels: give one for each."
            )


@dataclass(frozen=True)
class StageCConfig(UNetConfig):
    """Stage C; the defaults are the 3.6 B network."""

    c_in: int = 16
    c_out: int = 16
    c_r: int = 64
    patch_size: int = 1
    c_cond: int = 2048
    c_hidden: tuple[int, ...] = (2048, 2048)
    nhead: tuple[int, ...] = (32, 32)
    blocks: tuple[tuple[int, ...], ...] = ((8, 24), (24, 8))
    block_repeat: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1))
    level_config: tuple[str, ...] = ("CTA", "CTA")
    c_clip_text: int = 1280
    c_clip_text_pooled: int = 1280
    c_clip_img: int = 768
    c_clip_seq: int = 4
    kernel_size: int = 3
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True)
    t_conds: tuple[str, ...] = ("sca", "crp")
    switch_level: tuple[bool, ...] = (False,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_levels("switch_level", (*self.switch_level, False), len(self.c_hidden))


@dataclass(frozen=True)
class StageBConfig(UNetConfig):
    """Stage B; the defaults are the 1.5 B network."""

    c_in: int = 4
    c_out: int = 4
    c_r: int = 64
    patch_size: int = 2
    c_cond: int = 1280
    c_hidden: tuple[int, ...] = (320, 640, 1280, 1280)
    nhead: tuple[int, ...] = (-1, -1, 20, 20)
    blocks: tuple[tuple[int, ...], ...] = ((2, 6, 28, 6), (6, 28, 6, 2))
    block_repeat: tuple[tuple[int, ...], ...] = ((1, 1, 1, 1), (3, 3, 2, 2))
    level_config: tuple[str, ...] = ("CT", "CT", "CTA", "CTA")
    c_clip: int = 1280
    c_clip_seq: int = 4
    c_effnet: int = 16
    c_pixels: int = 3
    kernel_size: int = 3
    dropout: tuple[float, ...] = (0, 0, 0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True, True, True)
    t_conds: tuple[str, ...] = ("sca",)


@dataclass(frozen=True)
class StageAConfig(NetworkConfig):
    """Stage A, the VQGAN."""

    levels: int = 2
    bottleneck_blocks: int = 12
    c_hidden: int = 384
    c_latent: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.43

    def __post_init__(self) -> None:
        if not self.scale_factor > 0:
            raise CascadeError(
                f"Stage A's scale_factor is {self.scale_factor}, but a number above 0 is expected, as published "
                "0.43; correct the config."
            )

    @property
    def block_count(self) -> int:
        return self.levels + self.bottleneck_blocks


@dataclass(frozen=True)
class PreviewerConfig(NetworkConfig):
    """The previewer of Stage C latents."""

    c_in: int = 16
    c_hidden: int = 512
    c_out: int = 3


class EfficientNetStage(NamedTuple):
    """One row of EfficientNetV2's table: `layers` blocks of a kind; the first has the stride and changes the width."""

    kind: str  # "fused" (Fused-MBConv) or "mbconv"
    expand: int
    kernel: int
    stride: int
    c_out: int
    layers: int


PUBLISHED_STEM = 24
PUBLISHED_STAGES = (
    EfficientNetStage("fused", 1, 3, 1, 24, 2),
    EfficientNetStage("fused", 4, 3, 2, 48, 4),
    EfficientNetStage("fused", 4, 3, 2, 64, 4),
    EfficientNetStage("mbconv", 4, 3, 2, 128, 6),
    EfficientNetStage("mbconv", 6, 3, 1, 160, 9),
    EfficientNetStage("mbconv", 6, 3, 2, 256, 15),
)
PUBLISHED_LAST = 1280


def stage_table(rows: Sequence[Sequence[Any]]) -> tuple[EfficientNetStage, ...]:
    """Converts rows `(kind, expand, kernel, stride, c_out, layers)`, or five values where the kernel is 3, to stages.

    Raises CascadeError for a row that describes no stage.
    """
    return tuple(_stage(number, row) for number, row in enumerate(rows, start=1))


def _stage(number: int, row: Sequence[Any]) -> EfficientNetStage:
    full = [*row[:2], 3, *row[2:]] if len(row) == 5 else list(row)
    sizes_ok = len(full) == 6 and all(_is_of(size, int) and size > 0 for size in full[1:])
    if not sizes_ok or full[0] not in ("fused", "mbconv"):
        raise CascadeError(
            f"EfficientNet stage {number} is {quoted(list(row))}, expected [kind, expand, kernel, stride, c_out, "
            'layers] with kind "fused" or "mbconv" and positive integers (the kernel may be left out); '
            "correct the config."
        )
    return EfficientNetStage(*full)


@dataclass(frozen=True)
class CompressorConfig(NetworkConfig):
    """The semantic compressor; `c_latent` is the published constructor's one argument.

    The others give another size: `stages` holds rows `(kind, expand, kernel, stride, c_out, layers)` as
    EfficientNetStage; `drop_path` is the stochastic depth that the last blocks approach in training.
    """

    c_latent: int = 16
    stem: int = PUBLISHED_STEM
    stages: tuple[EfficientNetStage, ...] = PUBLISHED_STAGES
    c_last: int = PUBLISHED_LAST
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stage_table(self.stages))

    @property
    def block_count(self) -> int:
        return sum(stage.layers for stage in self.stages)

    def check_stride(self, name: str) -> None:
        """Raises CascadeError, naming the file, unless a position is 32 pixels; shapes show no strides."""
        stride = 2 * prod(stage.stride for stage in self.stages)
        if stride != COMPRESSOR_STRIDE:
            raise CascadeError(
                f"{name}: the strides of the compressor's stages make {stride} with the stem's 2, but "
                f"{COMPRESSOR_STRIDE} pixels a position are expected; correct the config."
            )


# Number of projections -> Stage C's residual blocks that they are for.
PUBLISHED_BLOCKS = {8: [0, 4, 8, 12, 51, 55, 59, 63], 64: list(range(64))}
BACKBONES = ("effnet", "large", "simple")
PUBLISHED_LARGE = {"c_wide": 4096 * 4, "c_hidden": 1024, "layers": 8, "c_last": PUBLISHED_LAST}


@dataclass(frozen=True)
class ControlNetConfig(NetworkConfig):
    """A ControlNet; the first four are the published constructor's arguments, the others give another size.

    `bottleneck_mode` names the backbone: "effnet" (None means this one) for images, "large" for the
    compressor's latents, "simple" for maps of features. `c_last` is the backbone's output (None: 1280, for
    simple `c_in`); `stem`, `stages` and `drop_path` shape "effnet" as in CompressorConfig; `c_wide` is the
    first layer of "large" (None: 16384) and "simple" (None: 4·c_in); `c_hidden` and `layers` are the residual
    blocks of "large".
    """

    c_in: int = 3
    c_proj: int = 2048
    proj_blocks: tuple[int, ...] = ()
    bottleneck_mode: str | None = None
    c_last: int | None = None
    stem: int = PUBLISHED_STEM
    stages: tuple[EfficientNetStage, ...] = PUBLISHED_STAGES
    c_wide: int | None = None
    c_hidden: int = PUBLISHED_LARGE["c_hidden"]
    layers: int = PUBLISHED_LARGE["layers"]
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stage_table(self.stages))
        blocks = self.proj_blocks
        if not blocks or min(blocks) < 0 or max(blocks) >= MOST_BLOCKS or len(set(blocks)) != len(blocks):
            raise CascadeError(
                f"ControlNet's proj_blocks is {quoted(list(blocks or ()))}, expected the numbers of Stage C's "
                "residual blocks, each once, such as [0, 4, 8, 12, 51, 55, 59, 63]; correct the config."
            )
        if self.bottleneck_mode not in (None, *BACKBONES):
            raise CascadeError(
                f"ControlNet's bottleneck_mode is {quoted(self.bottleneck_mode)}, expected one of "
                f"{', '.join(BACKBONES)}; correct the config."
            )

    @property
    def block_count(self) -> int:
        effnet = self.bottleneck_mode in (None, "effnet")
        backbone = sum(stage.layers for stage in self.stages) if effnet else self.layers
        return len(self.proj_blocks) + (0 if self.bottleneck_mode == "simple" else backbone)

    @property
    def hint_scale(self) -> int:
        """Pixels of the hint for each position of Stage C's latent, a side."""
        return COMPRESSOR_STRIDE if self.bottleneck_mode in (None, "effnet") else 1


# The published configurations, so that a network of a named size can be built without its file.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage_c_3.6b": ("stage_c", {}),
    "stage_c_1b": (
        "stage_c",
        {"c_cond": 1536, "c_hidden": [1536, 1536], "nhead": [24, 24], "blocks": [[4, 12], [12, 4]]},
    ),
    "stage_b_1.5b": ("stage_b", {}),
    "stage_b_700m": (
        "stage_b",
        {
            "c_hidden": [320, 576, 1152, 1152],
            "nhead": [-1, -1, 18, 18],
            "blocks": [[2, 4, 14, 4], [4, 14, 4, 2]],
            "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
        },
    ),
    "stage_a": ("stage_a", {}),
    "previewer": ("previewer", {}),
    "compressor": ("compressor", {}),
}
