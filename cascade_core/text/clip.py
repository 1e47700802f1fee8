"""Configuration and files of CLIP's text and image encoders.

State-dict names are Hugging Face's (`text_model.*`, `vision_model.*`), as in the published files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints import (
    check_weights,
    converted,
    describe,
    first_non_finite,
    heads_notice,
    load_published_state_dict,
    locate,
    read_weights,
)
from ..errors import CascadeError, printable, quoted
from ..networks.config import NetworkConfig
from ..networks.inference import completed, infer_config, stated_table
from ..networks.precision import cast_on_the_way

HEAD_WIDTH = 64
# {width: heads} of OpenAI's and OpenCLIP's encoders, of which two have wider heads.
PUBLISHED_HEADS = {
    "text": {width: width // HEAD_WIDTH for width in (512, 768, 1024, 1280)},
    "vision": {768: 12, 1024: 16, 1280: 16, 1664: 16},
}
# OpenAI's own encoders (text up to 768 wide, vision up to 1024) use the quick approximation of GELU; wider
# ones are OpenCLIP's and use the exact one. A file that differs says so in its config.
WIDEST_QUICK_GELU = {"text": 768, "vision": 1024}

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")  # those that both hosts can compute
LAYER_TENSORS = 16


@dataclass(frozen=True)
class ClipConfig(NetworkConfig):
    """The arguments that CLIP's encoders share, as transformers names them."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    projection_dim: int = 1280
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise CascadeError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size = "
                f"{self.hidden_size}; correct the config."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise CascadeError(
                f"hidden_act is {quoted(self.hidden_act)}, expected one of {', '.join(ACTIVATIONS)}; correct the "
                "config."
            )
        if not 0 < self.layer_norm_eps < 1:
            raise CascadeError(
                f"layer_norm_eps is {self.layer_norm_eps}, but a small number such as 1e-05 is expected; correct the "
                "config."
            )

    @property
    def block_count(self) -> int:
        return self.num_hidden_layers * LAYER_TENSORS


@dataclass(frozen=True)
class TextConfig(ClipConfig):
    """CLIP's text encoder; the defaults are the published one."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407


@dataclass(frozen=True)
class VisionConfig(ClipConfig):
    """CLIP's image encoder."""

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3


CONFIGS: dict[str, type[ClipConfig]] = {"text": TextConfig, "vision": VisionConfig}
CONFIG_KEYS = {part: tuple(field.name for field in fields(config)) for part, config in CONFIGS.items()}
PROJECTION = {"text": "text_projection", "vision": "visual_projection"}
ENCODER_NAME = {"text": "CLIP text encoder", "vision": "CLIP image encoder"}
CLIP_TOKENS = 49408

logger = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]
Model = TypeVar("Model", bound=nn.Module)


def infer_text_config(shapes: Shapes) -> dict[str, Any]:
    """Constructor arguments of a CLIP text encoder from its tensors' names and shapes.

    Heads are those of PUBLISHED_HEADS, for other widths 64 wide; the activation follows WIDEST_QUICK_GELU; the
    special tokens are the vocabulary's last two (49406 and 49407 in CLIP's own, also where further tokens were added
    to it).
    """
    vocabulary, _ = _shape(shapes, "text", "text_model.embeddings.token_embedding.weight", 2)
    positions, _ = _shape(shapes, "text", "text_model.embeddings.position_embedding.weight", 2)
    end = min(vocabulary, CLIP_TOKENS) - 1
    return {
        **_infer_transformer(shapes, "text"),
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def infer_vision_config(shapes: Shapes) -> dict[str, Any]:
    """Constructor arguments of a CLIP image encoder from its tensors' names and shapes. Heads are 64 wide."""
    _, channels, patch, _ = _shape(shapes, "vision", "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = _shape(shapes, "vision", "vision_model.embeddings.position_embedding.weight", 2)
    return {
        **_infer_transformer(shapes, "vision"),
        "image_size": math.isqrt(positions - 1) * patch,  # one position is the class token's
        "patch_size": patch,
        "num_channels": channels,
    }


def load_clip(
    path: str | Path,
    part: str,
    build: Callable[..., Model],
    dtype: torch.dtype | None = None,
    notify: Callable[[str], object] = logger.warning,
    placed: bool = False,
) -> Model:
    """Loads one encoder ("text" or "vision") from a safetensors file or a model folder, for inference.

    build: its constructor, `build(config, device)`; notify: is told where the number of heads is a guess.
    placed: the weights stay mapped; placement reads and casts them to `dtype` on their way to a device. The weights
    are the file's own pages, mapped, unless `dtype` asks for another. The config is the file's own (metadata
    `config`), or the model folder's `config.json`, completed by what the shapes tell. The other half is ignored in a
    file that holds both halves of CLIP. Raises CascadeError for a file of anything else.
    """
    file = weights_file(path, part)
    tensors, metadata = read_weights(path, part)
    weights = {name: tensor for name, tensor in tensors.items() if is_weight_of(name, part)}
    if not weights:
        raise CascadeError(
            f"{_describe(file, tensors, metadata)}, but a {ENCODER_NAME[part]} is expected here; choose one."
        )
    try:
        stated = _stated_config(metadata, part)
        config = _config(weights, stated, part)
        if "num_attention_heads" not in stated and config["hidden_size"] not in PUBLISHED_HEADS[part]:
            notify(heads_notice(file, [config["hidden_size"]]))
        model = _build_on_meta(build, config)
        check_weights(model, weights)  # before anything of the file is read
        if placed:
            cast_on_the_way(model, dtype)
        return fill_clip(model, weights if placed else converted(weights, dtype))
    except CascadeError as error:
        raise CascadeError(f"{file}: {error}") from None


def is_weight_of(name: str, part: str) -> bool:
    """Whether a tensor of CLIP's two halves is a weight of one of them ("text" or "vision")."""
    of_part = name.startswith((f"{part}_model.", f"{PROJECTION[part]}."))
    return of_part and not name.endswith(".position_ids")  # a constant that old files carry


def fill_clip(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """Fills a model on the meta device with these tensors, without a copy; for inference.

    Raises CascadeError if names or shapes differ.
    """
    load_published_state_dict(model, tensors)
    for module in model.modules():
        positions = getattr(module, "position_ids", None)  # 0, 1, 2, …: in no file, so still without values
        if positions is not None:
            values = torch.arange(positions.shape[-1]).unsqueeze(0)
            module.register_buffer("position_ids", values, persistent=False)
    return model.eval().requires_grad_(False)


def weights_file(path: str | Path, part: str) -> Path:
    """The safetensors file that a path means: itself, or a folder's weights, or those of its subfolder for the part."""
    located = locate(path, part)
    if not located.is_dir():
        return located  # its reader checks that it exists, and its kind
    names = sorted(file.name for file in located.glob("*.safetensors"))
    files = ", ".join(map(printable, names[:3])) + (", …" if len(names) > 3 else "") or "none"
    raise CascadeError(
        f"{path} holds no model.safetensors and not exactly one other safetensors file (found: {files}); "
        "name the file itself."
    )


def explain_non_finite(model: nn.Module, output: Tensor, encoder: str) -> None:
    """Raises CascadeError, naming the tensor at fault, if an encoder's output holds NaN or infinity."""
    if torch.isfinite(output).all():
        return
    name = first_non_finite(model)
    if name is not None:
        raise CascadeError(f"The {encoder}'s tensor {name} holds NaN or infinity; download its file again.")
    raise CascadeError(
        f"The {encoder} overflows in {next(model.parameters()).dtype}; load it in bf16 or fp32."
    )


def _infer_transformer(shapes: Shapes, part: str) -> dict[str, Any]:
    layers = next(n for n in count() if f"{part}_model.encoder.layers.{n}.mlp.fc1.weight" not in shapes)
    inner, width = _shape(shapes, part, f"{part}_model.encoder.layers.0.mlp.fc1.weight", 2)
    projected, _ = _shape(shapes, part, f"{PROJECTION[part]}.weight", 2)
    heads = PUBLISHED_HEADS[part].get(width, 0 if width % HEAD_WIDTH else width // HEAD_WIDTH)
    return {
        **({"num_attention_heads": heads} if heads else {}),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "projection_dim": projected,
        "hidden_act": "quick_gelu" if width <= WIDEST_QUICK_GELU[part] else "gelu",
    }


def _shape(shapes: Shapes, part: str, name: str, dimensions: int) -> Sequence[int]:
    if name in shapes and len(shapes[name]) == dimensions:
        return shapes[name]
    problem = f"{name} has the shape {tuple(shapes[name])}" if name in shapes else f"it lacks {name}"
    raise CascadeError(
        f"not a {ENCODER_NAME[part]} with its projection, under Hugging Face's names: {problem}."
    )


def _config(tensors: Mapping[str, Tensor], stated: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The stated configuration, completed from the tensors' shapes."""
    infer = {"text": infer_text_config, "vision": infer_vision_config}[part]
    inferred = infer({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if "num_attention_heads" not in {**inferred, **stated}:
        raise CascadeError(
            f"the {ENCODER_NAME[part]} is {inferred['hidden_size']} wide, which is not a multiple of {HEAD_WIDTH}, so "
            "its number of heads cannot be told; put its config into the file's metadata."
        )
    return completed(CONFIGS[part], inferred, stated, len(tensors))


def told_by(shapes: Shapes, config: Mapping[str, Any], part: str) -> bool:
    """Whether a configuration can be inferred from the tensors' names and shapes alone."""
    inferred = {"text": infer_text_config, "vision": infer_vision_config}[part](shapes)
    stated = {key: config[key] for key in CONFIG_KEYS[part] if key in config}
    if "num_attention_heads" not in inferred:
        return False
    return CONFIGS[part].from_dict(inferred) == CONFIGS[part].from_dict(stated)


def _stated_config(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """The config that the metadata, or the config.json beside the weights, states; empty where neither does."""
    config = stated_table(metadata)
    config = config.get(f"{part}_config", config)  # in the config of a whole CLIP
    if not isinstance(config, dict):
        raise CascadeError(
            f"its {part}_config is not a table of names and values; download its config again."
        )
    return {key: config[key] for key in CONFIG_KEYS[part] if config.get(key) is not None}


def _build_on_meta(build: Callable[..., Model], config: dict[str, Any]) -> Model:
    try:
        return build(config, device="meta")
    except Exception as error:  # transformers' own checks raise exceptions of many kinds
        raise CascadeError(
            f"no encoder can be built from its config {quoted(config)} ({quoted(str(error))}); download it again."
        ) from error


def _describe(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    for part, name in ENCODER_NAME.items():
        if any(tensor.startswith(f"{part}_model.") for tensor in tensors):
            return f"{path} is a {name}"
    try:
        return describe(path, *infer_config(tensors, metadata))
    except CascadeError:
        return f"{path} holds other tensors (first: {', '.join(map(printable, list(tensors)[:3]))})"
