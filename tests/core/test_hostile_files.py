"""Files that claim more than they hold: loading or refusing them takes no more memory than their own size."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import (
    NETWORKS,
    load_model,
    read_header,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from cascade_nodes.cascade_core.text.clip import load_clip
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.tests.nodes import tiny
from cascade_nodes.tests.obstacles import memory_limited_to

TRANSFORMER = {**tiny.TRANSFORMER, "hidden_size": 64, "intermediate_size": 96, "projection_dim": 48}
CONTROLNET = {"c_in": 16, "c_proj": 32, "proj_blocks": [0, 1], "c_wide": 16, "c_hidden": 8, "layers": 1}
CONFIGS = {
    **tiny.CONFIGS,
    "controlnet": {**CONTROLNET, "bottleneck_mode": "large", "c_last": 16},
    "text": {**TRANSFORMER, "vocab_size": 99, "max_position_embeddings": 77},
    "vision": {**TRANSFORMER, "image_size": 28, "patch_size": 14},
}
BUILDERS = {"text": build_text_model, "vision": build_vision_model}
HOSTILE = (10**9, -1, True, float("nan"), "\x1b[2J" * 99)
ALL_HOSTILE = (*HOSTILE, 10**30, 0, 0.5, 1e300, float("inf"), None, {"a": 1})
MEMORY = 300_000_000


@pytest.fixture(scope="module")
def networks():
    """{kind: tensors} of small networks."""
    torch.manual_seed(3)
    built = {kind: NETWORKS[kind].from_config(CONFIGS[kind]) for kind in NETWORKS}
    built |= {kind: build(CONFIGS[kind]) for kind, build in BUILDERS.items()}
    return {kind: network.state_dict() for kind, network in built.items()}


def load(path: Path, kind: str) -> Any:
    """The network, or the sentence with which its file is refused."""
    try:
        with memory_limited_to(MEMORY):
            return load_clip(path, kind, BUILDERS[kind]) if kind in BUILDERS else load_model(path, kind)[0]
    except CascadeError as error:
        sentence = str(error)
        assert sentence.endswith(".")
        assert sentence.isprintable()
        assert len(sentence) < 1200
        return sentence


def claims(config: dict, hostile_values: tuple) -> list[dict]:
    """Copies of a configuration with one of its values changed into each of the hostile ones."""
    changed = []
    for name, value in config.items():
        lists = ([nested(value)], [value] * 9, [[nested(10**9)] * 2] * 2)
        changed += [{**config, name: hostile} for hostile in (*hostile_values, *lists)]
        if isinstance(value, list) and value:
            changed += [{**config, name: [hostile, *value[1:]]} for hostile in hostile_values]
            if isinstance(value[0], list):
                first = ([hostile, *value[0][1:]] for hostile in hostile_values)
                changed += [{**config, name: [one, *value[1:]]} for one in first]
    return changed


def nested(value: Any) -> Any:
    for _ in range(50):
        value = [value]
    return value


@pytest.mark.parametrize(
    "hostile", [HOSTILE, pytest.param(ALL_HOSTILE, marks=pytest.mark.nightly)], ids=["some", "all"]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_claims_no_more_than_the_tensors_are(kind, hostile, networks, tmp_path):
    """The file is refused, or the network built is no larger than its tensors."""
    weights, path = networks[kind], tmp_path / "x.safetensors"
    refused = 0
    for config in claims(CONFIGS[kind], hostile):
        path.write_bytes(save(weights, {"config": json.dumps(config)}))
        loaded = load(path, kind)
        refused += isinstance(loaded, str)
        if not isinstance(loaded, str):
            built = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
            assert built == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert refused > len(CONFIGS[kind]) * len(hostile) / 2
    for text in ("[" * 99_999, "{" * 99, "5", "null", '{"c_cond": %s}' % ("1" * 5000)):
        path.write_bytes(save(weights, {"config": text}))
        loaded = load(path, kind)  # as if it had none, where that is enough
        assert not isinstance(loaded, str) or text not in loaded


def test_layers_are_counted_and_not_believed(networks, tmp_path):
    extra = {f"text_model.encoder.layers.{n}.x": torch.zeros(1) for n in (10**9, int("9" * 50))}
    write_safetensors(tmp_path / "x.safetensors", {**networks["text"], **extra}, {})
    assert "2 unexpected (text_model.encoder.layers." in load(tmp_path / "x.safetensors", "text")


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.complex64, torch.bool, torch.int8])
def test_a_type_that_no_network_computes_with(dtype, networks, tmp_path):
    weights = networks["previewer"]
    weights = {**weights, "blocks.0.bias": torch.zeros(16).to(dtype)}
    (tmp_path / "x.safetensors").write_bytes(save(weights))
    assert "1 of another type (blocks.0.bias torch." in load(tmp_path / "x.safetensors", "previewer")


@pytest.mark.parametrize("shape", [(0,), (0, 2**40), (), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_odd_shapes_anywhere(shape, networks, tmp_path):
    for kind, weights in networks.items():
        for name in list(weights)[::17]:
            (tmp_path / "x.safetensors").write_bytes(save({**weights, name: torch.zeros(shape)}))
            loaded = load(tmp_path / "x.safetensors", kind)
            assert isinstance(loaded, str) or weights[name].shape == shape


SCALES = {
    "one": (torch.tensor(2.0), True),
    "one in a list": (torch.tensor([2.0]), True),
    "one a row": (torch.full((6, 1), 2.0), True),
    "a column for a row": (torch.full((6, 1, 1), 2.0), False),
    "none": (torch.zeros(0), False),
    "too many": (torch.full((60_000, 1), 2.0), False),
    "NaN": (torch.tensor(torch.nan), False),
    "infinity": (torch.full((6, 1), torch.inf), False),
    "whole numbers": (torch.tensor(2), False),
    "complex": (torch.tensor(2j), False),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_fits_its_weight(name, tmp_path):
    scale, fits = SCALES[name]
    weight = torch.ones(6, 4).to(torch.float8_e4m3fn)
    tensors = {"vquantizer.codebook.weight": torch.ones(2, 2), "x.weight": weight, "x.scale_weight": scale}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    if fits:
        read, _ = read_weights(tmp_path / "x.safetensors", "stage_a")
        assert read["x.weight"].dtype == torch.bfloat16
        assert read["x.weight"].eq(2).all()
        return
    with pytest.raises(CascadeError, match=r"^x.safetensors: x.weight has a scale that does not fit it \("):
        read_weights(tmp_path / "x.safetensors", "stage_a")


def test_a_row_times_a_column_is_not_multiplied(tmp_path):
    row = torch.ones(1, 30_000).to(torch.float8_e4m3fn)  # 60 kB, and 3.6 GB as a product
    tensors = {
        "vquantizer.codebook.weight": torch.ones(2, 2),
        "x.weight": row,
        "x.scale_weight": row.T.clone(),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with memory_limited_to(MEMORY), pytest.raises(CascadeError, match=r"\(30000, 1\) for \(1, 30000\)"):
        read_weights(tmp_path / "x.safetensors", "stage_a")


@pytest.mark.parametrize("read", [read_safetensors, read_header])
def test_a_header_is_bounded(read, tmp_path):
    """A million tensors in 90 MB: the format allows it, no network has it."""
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(90_000_100)
    with (
        memory_limited_to(MEMORY),
        pytest.raises(CascadeError, match="claims 90000000 bytes, but 25000000 at most"),
    ):
        read(tmp_path / "x.safetensors")
