"""LoRAs for the tests: the golden one in its dialects, one that changes everything, and files of other models."""

import torch
from torch import Tensor

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank
from cascade_nodes.cascade_core.adapters.names import stage_c_shapes
from cascade_nodes.tests.golden_weights import read_golden

GOLDEN, ABOUT = read_golden("stage_c_lora")
STAGE_C, STAGE_C_ABOUT = read_golden("stage_c")
CONFIG = StageC.from_config(STAGE_C_ABOUT["config"]).config
TEXT_SHAPES = {
    "text_model.encoder.layers.0.self_attn.q_proj": (12, 12),
    "text_model.encoder.layers.0.self_attn.k_proj": (12, 12),
    "text_model.encoder.layers.0.self_attn.v_proj": (12, 12),
    "text_model.encoder.layers.0.self_attn.out_proj": (12, 12),
    "text_model.encoder.layers.11.mlp.fc1": (48, 12),
    "text_model.encoder.layers.11.mlp.fc2": (12, 48),
    "text_projection": (10, 12),
}


def golden(dialect: str) -> dict[str, Tensor]:
    """The tensors of the golden LoRA's file in a dialect."""
    return {key.removeprefix(f"{dialect}."): t for key, t in GOLDEN.items() if key.startswith(f"{dialect}.")}


def change(shape: tuple[int, ...], rank: int = 3, alpha: float | None = None, dora: str = "") -> LowRank:
    """A random change of a weight; dora: "row" or "column" magnitudes, or none."""
    ones = [1] * (len(shape) - 2)
    down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones)
    sizes = {"row": (shape[0], 1), "column": (1, shape[1])}
    return LowRank(down, up, alpha, torch.rand(sizes[dora]) + 0.5 if dora else None)


def everything(seed: int = 0) -> Adapter:
    """Every layer of the golden Stage C and some of a text encoder, of several ranks, scales and kinds; two tokens."""
    torch.manual_seed(seed)
    kinds = ["", "row", "column"]
    changes = {}
    for i, (layer, shape) in enumerate([*stage_c_shapes(CONFIG).items(), *TEXT_SHAPES.items()]):
        changes[layer] = change(shape, 1 + i % 4, float(i % 5 + 1), kinds[i % 3])
    stage_c = {layer: changes[layer] for layer in stage_c_shapes(CONFIG)}
    text = {layer: changes[layer] for layer in TEXT_SHAPES}
    tokens = (
        LearnedToken("[fernando]", torch.randn(1, 12)),
        LearnedToken("<a.style>", torch.randn(3, 12)),
        LearnedToken("<a.style>", torch.randn(3, 12), output=True),
    )
    return Adapter("all.safetensors", "kohya", stage_c, text, tokens)


def kohya_file(
    layers: dict[str, tuple[int, int]], prefix: str = "lora_unet_", rank: int = 2
) -> dict[str, Tensor]:
    """A LoRA of some layers, by flattened names and weights' shapes, in kohya's keys."""
    tensors = {}
    for layer, (rows, columns) in layers.items():
        tensors |= {
            f"{prefix}{layer}.lora_down.weight": torch.zeros(rank, columns),
            f"{prefix}{layer}.lora_up.weight": torch.zeros(rows, rank),
            f"{prefix}{layer}.alpha": torch.tensor(1.0),
        }
    return tensors
