"""From files to networks: what a file is, whether it is whole, and that nothing is copied."""

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import (
    KIND_NAMES,
    NETWORKS,
    describe,
    first_non_finite,
    load_model,
    load_published_state_dict,
    read_safetensors,
    write_safetensors,
)
from cascade_nodes.cascade_core.stages.codec import load_compressor
from cascade_nodes.cascade_core.stages.device import ComputeDevice
from cascade_nodes.tests.nodes.tiny import CONFIGS, shake


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: file} of small random networks that state their configuration."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, config in CONFIGS.items():
        network = NETWORKS[kind].from_config(config)
        shake(network)
        metadata = {"kind": kind, "config": json.dumps(config)}
        write_safetensors(folder / f"{kind}.safetensors", network.state_dict(), metadata)
    return {kind: folder / f"{kind}.safetensors" for kind in CONFIGS}


def changed(file: Path, path: Path, change=None, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a file, after `change` of its {name: tensor} and with other metadata."""
    tensors, stated = read_safetensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if change is not None:
        change(tensors)
    write_safetensors(path, tensors, stated if metadata is None else metadata)
    return path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_is_loaded_as_what_it_is(kind, files):
    network, found, config = load_model(files[kind], expect=kind)
    assert type(network) is NETWORKS[kind]
    assert found == kind
    assert config.items() >= CONFIGS[kind].items()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("expected", KIND_NAMES)
def test_a_file_of_another_kind(kind, expected, files):
    if kind == expected:
        assert load_model(files[kind], expect=expected)[1] == expected
        return
    with pytest.raises(CascadeError) as caught:
        load_model(files[kind], expect=expected)
    found, wanted = KIND_NAMES[kind], KIND_NAMES[expected]
    sentence = str(caught.value)
    assert sentence.startswith(f"{kind}.safetensors is a {found} checkpoint")
    assert sentence.endswith(
        f", but {wanted} is expected here; choose a {wanted} file, or load this one as {found}."
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            "text_model.x",
            "x.safetensors is a CLIP text encoder, but Stage B is expected here; choose a Stage B",
        ),
        ("vision_model.x", "x.safetensors is a CLIP image encoder, but Stage B is expected here; choose a "),
        ("other.x", r"x.safetensors: These 1 tensors \(first: other.x\) are of no Stable Cascade network"),
    ],
)
def test_a_file_of_no_network_of_ours(tensor, message, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {tensor: torch.zeros(1)}, {})
    with pytest.raises(CascadeError, match=message):
        load_model(tmp_path / "x.safetensors", expect="stage_b")
    with pytest.raises(CascadeError, match="are of no Stable Cascade network"):
        load_model(tmp_path / "x.safetensors")


NOT_WHOLE = {
    "a layer is missing": (
        lambda tensors: tensors.pop("clip_txt_mapper.bias"),
        r"The weights do not fit StageC: 1 missing \(clip_txt_mapper.bias\); choose a whole file",
    ),
    "a layer is unknown": (
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        r"do not fit StageC: 1 unexpected \(extra\);",
    ),
    "many are unknown": (
        lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(5)}),
        r"5 unexpected \(extra.0, extra.1, extra.2, …\);",
    ),
    "another shape": (
        lambda tensors: tensors.update({"clip_txt_mapper.bias": torch.zeros(5)}),
        r"1 of another shape \(clip_txt_mapper.bias \(5,\) instead of \(32,\)\);",
    ),
    "whole numbers": (
        lambda tensors: tensors.update({"clf.1.bias": torch.zeros(16, dtype=torch.int32)}),
        r"1 of another type \(clf.1.bias torch.int32 instead of floating point\);",
    ),
    "what tells its width is missing": (
        lambda tensors: tensors.pop("clip_txt_pooled_mapper.weight"),
        r"tensors are named as a Stable Cascade network's \(stage_c\), but "
        "'clip_txt_pooled_mapper.weight' is missing; download the file again",
    ),
    "what tells its width has no shape": (
        lambda tensors: tensors.update({"clip_txt_mapper.weight": torch.zeros(())}),
        r"named as a Stable Cascade network's \(stage_c\), but some shapes are not its own; download",
    ),
    "fused rows that are not three parts": (
        lambda tensors: tensors.update({"attn.in_proj_bias": torch.zeros(4)}),
        r"attn.in_proj_bias has the shape \(4,\), whose rows do not make three equal parts",
    ),
    "fused rows that are none": (
        lambda tensors: tensors.update({"attn.in_proj_bias": torch.zeros(())}),
        r"attn.in_proj_bias has the shape \(\), whose rows do not make three equal parts",
    ),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
@pytest.mark.parametrize("stated", [True, False])
def test_a_file_that_is_not_whole(name, stated, files, tmp_path):
    change, message = NOT_WHOLE[name]
    file = changed(files["stage_c"], tmp_path / "x.safetensors", change, None if stated else {})
    with pytest.raises(CascadeError, match=f"^x.safetensors: .*{message}") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"c_cond": 64, "nhead": [2, 2], "colour": 1}', "StageCConfig does not know colour; it takes "),
        ('{"c_cond": "wide"}', "StageCConfig's c_cond is 'wide', but a value such as 2048 is expected; correct"),
        ('{"c_cond": 1.5}', "c_cond is 1.5, but a value such as 2048 is expected"),
        ('{"c_cond": true}', "c_cond is True, but a value such as 2048 is expected"),
        ('{"c_cond": NaN}', "c_cond is nan, but a value such as 2048 is expected"),
        ('{"c_cond": -5}', "c_cond is -5, but a value such as 2048 is expected"),
        ('{"c_cond": 0}', "of another shape"),
        ('{"c_clip_seq": 4611686018427387904}', "c_clip_seq is 4611686018427387904, but a value such as 4 is"),
        ('{"nhead": null}', r"nhead is None, but a value such as \(32, 32\) is expected"),
        ('{"nhead": [[[[[2]]]]]}', r"nhead is \[\[\[\[\.\.\.\]\]\]\], but a value such as"),
        ('{"dropout": [NaN, 0]}', r"dropout is \[nan, 0\], but a value such as"),
        ('{"switch_level": [0]}', r"switch_level is \[0\], but a value such as \(False,\) is expected"),
        ('{"c_hidden": [32, "x"]}', r"c_hidden is \[32, 'x'\], but a value such as \(2048, 2048\) is expected"),
        ('{"c_hidden": 5}', r"c_hidden is 5, but a value such as \(2048, 2048\) is expected"),
        ('{"t_conds": ["a\\u001b[31m", 5]}', r"t_conds is \['a\\x1b\[31m', 5\], but a value"),
        ('{"blocks": [[1, 1]]}', r"blocks is \(\(1, 1\),\), but \[down, up\] is expected"),
        ('{"blocks": [[1000000000, 1], [1, 1]]}', "asks for 5000000021 blocks, but there are only 110 tensors"),
        ('{"block_repeat": [[1, 1], [1, 2000000000]]}', "asks for 2000000025 blocks, but there are only"),
        (json.dumps({"t_conds": ["sca"] * 9999}), "asks for 40[0-9]+ blocks, but there are only"),
        ('{"c_hidden": []}', r"nhead holds \d values, but c_hidden has 0 levels"),
        ('{"nhead": [7, 7]}', r"nhead\[0\] is 7, which does not divide c_hidden\[0\] = 32"),
        ('{"c_clip_text": 1280}', r"1 of another shape \(clip_txt_mapper.weight \(32, 64\) instead of "),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong(text, message, files, tmp_path):
    file = changed(files["stage_c"], tmp_path / "x.safetensors", metadata={"config": text})
    with pytest.raises(CascadeError, match=f"^x.safetensors: .*{message}") as caught:
        load_model(file, expect="stage_c")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "detail"),
    [
        ({"c_hidden": [320, 640]}, " (width 640)"),
        ({"c_hidden": 384}, " (width 384)"),
        ({"c_hidden": ["wide"]}, ""),
        ({"c_hidden": []}, ""),
        ({}, ""),
    ],
)
def test_a_file_in_a_few_words(config, detail):
    assert (
        describe("folder/x.safetensors", "stage_b", config)
        == f"x.safetensors is a Stage B checkpoint{detail}"
    )


def test_precision(files):
    half, _, _ = load_model(files["compressor"], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16, torch.int64}
    own, _, _ = load_model(files["compressor"])
    weights, _ = read_safetensors(files["compressor"])
    assert own.state_dict().keys() == weights.keys()
    for name, tensor in own.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name])
        assert torch.equal(half.state_dict()[name], tensor.to(half.state_dict()[name].dtype))


def test_weights_are_the_files_own_pages(files, tmp_path):
    """What is written into the file shows in the model: there is no copy."""
    file = changed(files["stage_c"], tmp_path / "x.safetensors")
    shared, _, _ = load_model(file)
    copied, _, _ = load_model(file, dtype=torch.float64)
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    begin, _ = json.loads(file.read_bytes()[8 : 8 + length])["clf.1.bias"]["data_offsets"]
    before = copied.get_parameter("clf.1.bias").tolist()
    with file.open("r+b") as stream:
        stream.seek(8 + length + begin)
        stream.write(struct.pack("<f", 123.5))
    assert shared.get_parameter("clf.1.bias").tolist() == [123.5, *before[1:]]
    assert copied.get_parameter("clf.1.bias").tolist() == before


def test_a_model_with_weights_keeps_them_apart_from_the_given_ones(files):
    weights, _ = read_safetensors(files["stage_c"])
    network = NETWORKS["stage_c"].from_config(CONFIGS["stage_c"])
    load_published_state_dict(network, weights)
    assert torch.equal(network.get_parameter("clf.1.bias"), weights["clf.1.bias"])
    assert network.get_parameter("clf.1.bias").data_ptr() != weights["clf.1.bias"].data_ptr()


class Two(nn.Module):
    """A weight, and a count as batch norms have one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first = nn.Buffer(torch.zeros(3).to(dtype))
        self.second = nn.Buffer(torch.zeros(3).to(dtype))
        self.count = nn.Buffer(torch.tensor(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_what_is_not_finite_is_named(dtype):
    model = Two(dtype)
    assert first_non_finite(model) is None
    model.second.copy_(torch.tensor([0.0, torch.nan, 0.0]))
    assert first_non_finite(model) == "second"
    if dtype is not torch.float8_e4m3fn:  # which has no infinity
        model.first.copy_(torch.tensor([0.0, 0.0, -torch.inf]))
        assert first_non_finite(model) == "first"


def test_strides_that_leave_no_trace_in_the_weights(files, tmp_path):
    config = {
        **CONFIGS["compressor"],
        "stages": [[*row[:2], 1, *row[3:]] for row in CONFIGS["compressor"]["stages"]],
    }
    file = changed(files["compressor"], tmp_path / "x.safetensors", metadata={"config": json.dumps(config)})
    with pytest.raises(
        CascadeError, match=r"the strides of the compressor's stages make 2 with the stem's 2, but 32 "
    ):
        load_compressor(file, None, ComputeDevice("cpu"))
