"""One frozen dataclass per model, with the published constructors' argument names and defaults.

`infer_config` reads the kind and the configuration of a checkpoint back from its names and shapes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ..errors import CascadeError

PUBLISHED_HEAD_WIDTH = 64


class Config:
    """What all configurations share: made from a dict, with unknown names refused."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(config) - known)
        if unknown:
            raise CascadeError(
                f"{cls.__name__} does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}."
            )
        return cls(**{name: _frozen(value) for name, value in config.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class UNetConfig(Config):
    """What Stage B and Stage C share. Per-level values are tuples; `blocks` and `block_repeat` hold (down, up)."""

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
        """As published: one `dropout` or `self_attn` serves all levels, and `block_repeat` may be None."""
        full = {"self_attn": True, **config}
        levels = len(full.get("c_hidden", cls.c_hidden))
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
            for direction in getattr(self, name):
                self._expect_levels(name, direction, levels)
        for level, kinds in enumerate(self.level_config):
            if set(kinds) - set("CTAF"):
                raise CascadeError(
                    f"level_config[{level}] is {kinds!r}, but a level is made of C (ResBlock), T (TimestepBlock), "
                    "A (AttnBlock) and F (FeedForwardBlock)."
                )
            if "A" in kinds and (self.nhead[level] < 1 or self.c_hidden[level] % self.nhead[level]):
                raise CascadeError(
                    f"nhead[{level}] is {self.nhead[level]}, which does not divide c_hidden[{level}] "
                    f"= {self.c_hidden[level]}."
                )

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
class StageAConfig(Config):
    """Stage A, the VQGAN."""

    levels: int = 2
    bottleneck_blocks: int = 12
    c_hidden: int = 384
    c_latent: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.43


@dataclass(frozen=True)
class PreviewerConfig(Config):
    """The previewer of Stage C latents."""

    c_in: int = 16
    c_hidden: int = 512
    c_out: int = 3


# What the published files hold, so that a size can be named and made without a file.
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


def infer_config(
    state_dict: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """The kind and the configuration of a checkpoint in published (or split-attention) names.

    state_dict: anything whose values have a `shape`; metadata: the safetensors header's, whose JSON `config` wins
    over what shapes can tell. Kinds: stage_a stage_b stage_c compressor previewer controlnet.
    Raises CascadeError where the names are of none of them.
    """
    from .compressor import infer_compressor
    from .controlnet import infer_controlnet
    from .inference import infer_previewer, infer_stage_a, infer_stage_b, infer_stage_c

    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    for kind, infer in (
        ("stage_c", infer_stage_c),
        ("stage_b", infer_stage_b),
        ("stage_a", infer_stage_a),
        ("previewer", infer_previewer),
        ("controlnet", infer_controlnet),
        ("compressor", infer_compressor),
    ):
        try:
            config = infer(shapes)
        except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else "some shapes are not its own"
            raise CascadeError(
                f"These {len(shapes)} tensors are named as a Stable Cascade network's ({kind}), but {reason}; "
                "download the file again."
            ) from error
        if config is not None:
            return kind, {**config, **_stated_config(metadata)}
    raise CascadeError(
        f"These {len(shapes)} tensors (first: {', '.join(list(shapes)[:3])}) are of no Stable Cascade network; "
        "expected Stage A, B or C, the semantic compressor, the previewer or a ControlNet, in their published names."
    )


def _stated_config(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("config")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CascadeError(f"The checkpoint's metadata holds a config that is not JSON ({error}).") from None
    return config if isinstance(config, dict) else {}
