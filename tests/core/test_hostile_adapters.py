"""LoRA files and what lies beside them: patterns are never run, and what scales a change is a number."""

import json
import os
import re

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import parse_adapter, read_adapter
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.adapters.embeddings import read_embedding
from cascade_nodes.cascade_core.adapters.patterns import texts
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.tests.obstacles import memory_limited_to

BLOCK = "base_model.model.down_blocks.0.2.attention"
LAYERS = [f"{BLOCK}.to_q", f"{BLOCK}.to_k", f"{BLOCK}.to_out.0", "base_model.model.clf.1"]
RANK = 4


@pytest.fixture
def peft_file(tmp_path):
    shapes = {layer: ((8, 8) if "attention" in layer else (8, 8, 1, 1)) for layer in LAYERS}
    tensors = {}
    for layer, (rows, columns, *kernel) in shapes.items():
        tensors[f"{layer}.lora_A.weight"] = torch.ones(RANK, columns, *kernel)
        tensors[f"{layer}.lora_B.weight"] = torch.ones(rows, RANK, *kernel)
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors, {})
    return tmp_path / "adapter_model.safetensors"


PATTERNS = [
    {"to_q": 2},
    {"attention.to_q": 2, "to_q": 3},
    {"to_q|to_k": 2},
    {"to_q|attention.to_k": 2, "to_k": 3, "q": 5},
    {r"to_out\.0": 2},
    {"to_out.0": 1.5},
    {"^clf.1": 2, "^to_q": 3},
    {"clf.1$": 2},
    {"clf": 2, "1": 3},
    {"tok?_q|to_z?k": 2},
    {"down_blocks.0.2.attention.to_k": 2},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_are_pefts_own(pattern, rslora, peft_file):
    """PEFT takes the first pattern for which `re.match(rf"(.*\\.)?({pattern})$", layer)`."""
    config = {"r": RANK, "lora_alpha": 8, "alpha_pattern": pattern, "use_rslora": rslora}
    peft_file.with_name("adapter_config.json").write_text(json.dumps(config))
    read = low_rank_changes(read_adapter(peft_file).stage_c)
    names = {"to_q": "attn.to_q", "to_k": "attn.to_k", "to_out.0": "attn.out_proj"}
    for layer in LAYERS:
        peft_name = layer.removeprefix("base_model.model.")
        matching = (alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", peft_name))
        alpha = next(matching, 8)
        block, _, leaf = peft_name.partition("attention.")
        ours = f"{block}attention.{names[leaf]}" if leaf else peft_name
        assert read[ours].scale == alpha / (RANK**0.5 if rslora else RANK)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*b",
        "to_[qk]",
        ".*attention.*",
        "a{9}",
        "(",
        "a**",
        "\\",
        r"\d",
        "?",
        "a?" * 40,
        "a" * 10_000,
    ],
)
def test_regular_expressions_are_not_run(pattern, peft_file):
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 4}}
    peft_file.with_name("adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        CascadeError, match=r"in alpha_pattern, but .* regular expression, which is not run\.$"
    ):
        read_adapter(peft_file)
    assert texts(pattern) is None


@pytest.mark.parametrize(
    "alpha", ["NaN", "Infinity", "-Infinity", "0", "-4", "1e9", '"8"', "true", "null", "[8]", "{}"]
)
def test_a_stated_alpha_is_a_number(alpha, peft_file):
    config = peft_file.with_name("adapter_config.json")
    config.write_text(f'{{"lora_alpha": {alpha}}}')
    with pytest.raises(
        CascadeError, match=r"is not a PEFT configuration with a lora_alpha above 0.*again\.$"
    ):
        read_adapter(peft_file)
    config.write_text(f'{{"lora_alpha": 8, "alpha_pattern": {{"to_q": {alpha}}}}}')
    with pytest.raises(CascadeError, match="for 'to_q' in alpha_pattern, but numbers above 0"):
        read_adapter(peft_file)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 99_999, '{"lora_alpha": ' + "1" * 5000 + "}", "\ud800"]
)
def test_a_configuration_that_is_none(text, peft_file):
    peft_file.with_name("adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CascadeError, match=r"adapter_config.json is not (JSON with a table|text in UTF-8)"):
        read_adapter(peft_file)


def test_a_configuration_as_large_as_a_disk_or_a_pipe(peft_file):
    config = peft_file.with_name("adapter_config.json")
    with config.open("wb") as file:
        file.truncate(10**12)
    with (
        memory_limited_to(300_000_000),
        pytest.raises(CascadeError, match="has more than the 25000000 bytes"),
    ):
        read_adapter(peft_file)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CascadeError, match="cannot be read"):
        read_adapter(peft_file)


@pytest.mark.parametrize(
    "alpha",
    [
        torch.zeros(0),
        torch.zeros(1_000_000),
        torch.tensor(torch.nan),
        torch.tensor(-torch.inf),
        torch.tensor(1e30),
        torch.tensor(True),
        torch.tensor(2j),
        torch.tensor(torch.nan).to(torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_an_alpha_in_the_file_is_a_number(alpha):
    layer = "lora_unet_clip_txt_mapper"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(CascadeError, match=r"has an alpha of .*, but one number is expected") as caught:
        parse_adapter({**tensors, f"{layer}.alpha": alpha}, {}, "style")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([-1]),
        torch.tensor([0.5]),
        torch.tensor([torch.nan]),
        torch.tensor([True]),
        torch.tensor([[1]]),
    ],
    ids=str,
)
def test_numbers_of_tokens_are_whole_numbers(indices):
    tensors = {"embeddings.embeddings": torch.ones(1, 4), "embeddings.indices": indices}
    with pytest.raises(CascadeError, match="do not belong together"):
        parse_adapter(tensors, {}, "style")


def test_long_names_cost_no_more_than_they_are_long():
    """Many beginnings of a name that a pattern would follow to its end, one after the other."""
    tensors = {"attn2.to_k." * 90 + str(i): torch.ones(1, 1) for i in range(200)}
    with pytest.raises(
        CascadeError, match="is not a LoRA for Stable Cascade: 0 of its 200 tensors match"
    ) as caught:
        parse_adapter(tensors, {}, "style")
    assert len(str(caught.value)) < 1000


def test_names_do_not_speak_to_a_terminal():
    tensors = {"\x1b[2Jred": torch.ones(1), "a\0b": torch.ones(1)}
    with pytest.raises(CascadeError) as caught:
        parse_adapter(tensors, {}, "style")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_g": torch.zeros(0, 8)}, "but an embedding is expected"),
        ({"clip_g": torch.zeros(2, 8, dtype=torch.int64)}, "but an embedding is expected"),
        ({"clip_g": torch.zeros(())}, "but an embedding is expected"),
        (
            {"bundle_emb.a.clip_g": torch.zeros(1, 8), "bundle_emb.b.clip_g": torch.zeros(1, 7)},
            "holds vectors 7 wide",
        ),
    ],
)
def test_embeddings_of_odd_shapes(tensors, message, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(CascadeError, match=message):
        read_embedding(tmp_path / "x.safetensors", 8)
