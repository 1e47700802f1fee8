"""Adapters of every algorithm as ComfyUI's weight patches, and as its own loader reads those that we write."""

import tempfile
from pathlib import Path

import comfy.lora
import torch
from comparing import relative
from torch import Tensor

from cascade_nodes.cascade_core.adapters import to_dialect
from cascade_nodes.cascade_core.adapters.names import parameter_name
from cascade_nodes.cascade_core.adapters.write import obstacles
from cascade_nodes.nodes.hosts.comfyui.adapters import NETWORK, TEXT, weight_patches
from cascade_nodes.tests.core.other_adapters import before, cases, read


def error(patches: dict, prefixes: tuple[str, ...], changed: dict[str, Tensor]) -> float:
    """The largest relative error of the parameters that ComfyUI computes with patches; 9 where some are left alone."""
    errors = []
    for target, expected in changed.items():
        key = next((key for p in prefixes if (key := f"{p}{parameter_name(target)}") in patches), None)
        if key is None:
            return 9.0
        weight = before(target, tuple(expected.shape))
        patch = [(1.0, patches[key], 1.0, None, None)]
        errors.append(relative(comfy.lora.calculate_weight(patch, weight, key), expected))
    return max(errors)


def measure() -> dict[str, float]:
    results = {}
    for name, case in cases().items():
        with tempfile.TemporaryDirectory() as folder:
            adapter = read(name, Path(folder))
            patches = weight_patches(adapter.stage_c, NETWORK) | weight_patches(adapter.text, TEXT)
            results[name] = error(patches, (NETWORK, TEXT), case.changed)
            if not obstacles(adapter, "comfyui"):
                keys = {
                    f"{prefix}{target}": f"{of_host}{target}.weight"
                    for target in case.changed
                    for prefix, of_host in ((NETWORK, NETWORK), (f"text_encoders.{TEXT}", TEXT))
                }
                file = {
                    key: torch.as_tensor(value) for key, value in to_dialect(adapter, "comfyui")[0].items()
                }
                patches = comfy.lora.load_lora(file, keys, log_missing=False)
                results[f"{name}, by ComfyUI's loader"] = error(patches, (NETWORK, TEXT), case.changed)
    return results
