"""Files that the published trainer's own code made, of several lists of module_filters."""

import json
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError, StageC
from cascade_nodes.cascade_core.adapters import parse_adapter
from cascade_nodes.cascade_core.adapters.names import QKV
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.tests.golden_weights import relative_error

FILES = Path(__file__).parents[1] / "data" / "adapters"
EXPECTED, ABOUT = read_safetensors(FILES / "official_expected.safetensors")
CONFIG = StageC.from_config(json.loads(ABOUT["config"])).config
FILTERS = json.loads(ABOUT["filters"])
AMBIGUOUS = {"out_proj": "out_proj or kv_mapper", "kv_mapper": "out_proj or kv_mapper"}


def changed(adapter) -> dict[str, torch.Tensor]:
    """ΔW by the published name of the weight."""
    deltas = {layer: change.delta() for layer, change in adapter.stage_c.items()}
    weights = {f"{layer}.weight": delta for layer, delta in deltas.items() if not layer.endswith(QKV)}
    for layer in deltas:
        if layer.endswith(QKV[0]):
            block = layer.removesuffix(QKV[0])
            weights[f"{block}attn.in_proj_weight"] = torch.cat([deltas[block + part] for part in QKV])
    return weights


@pytest.mark.parametrize("name", FILTERS)
def test_it_changes_what_the_published_code_changes(name):
    tensors, metadata = read_safetensors(FILES / f"official_{name}.safetensors")
    expected = {key.removeprefix(f"{name}."): t for key, t in EXPECTED.items() if key.startswith(f"{name}.")}
    found = [parse_adapter(tensors, metadata, name, CONFIG, filters=FILTERS[name])]
    if name not in (*AMBIGUOUS, "block"):
        found.append(parse_adapter(tensors, metadata, name, CONFIG))
    for adapter in found:
        weights = changed(adapter)
        assert weights.keys() == expected.keys()
        for key, delta in expected.items():
            assert relative_error(weights[key].reshape(delta.shape), delta) <= 1e-5


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_fits_several_is_not_guessed(name):
    tensors, metadata = read_safetensors(FILES / f"official_{name}.safetensors")
    with pytest.raises(
        CascadeError, match=f"which could be those of {AMBIGUOUS[name]}; give the module_filters"
    ):
        parse_adapter(tensors, metadata, name, CONFIG)
