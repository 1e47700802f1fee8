"""`cascade convert-lora`: what it says, writes and refuses."""

import json

import pytest

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import DIALECTS, parse_adapter, read_adapter
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.core.lora_files import ABOUT, CONFIG, STAGE_C_ABOUT, golden, kohya_file
from cascade_nodes.tests.golden_weights import relative_error


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the golden LoRA of the official dialect and the Stage C it is for."""
    monkeypatch.chdir(tmp_path)
    write_safetensors("official.safetensors", golden("official"), {"trained_by": "hand"})
    weights = {name: tensor.contiguous() for name, tensor in StageC(CONFIG).state_dict().items()}
    write_safetensors("stage_c.safetensors", weights, {"config": json.dumps(STAGE_C_ABOUT["config"])})
    return tmp_path


def convert(*arguments):
    return main(["convert-lora", *arguments])


def failing(*arguments, capsys):
    """What a conversion that fails says on standard error."""
    assert convert(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


MODEL = ("--model", "stage_c.safetensors")


def test_a_lora_is_written_and_described(folder, capsys):
    options = ("--to", "kohya", *MODEL, "--without", "tokens")
    assert convert("official.safetensors", "kohya.safetensors", *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "official.safetensors (official): 24 layers of Stage C, rank 3, "
        "2 learned tokens (vocabulary's 3, vocabulary's 17)",
        "Left out: tokens",
        "Written: kohya.safetensors (kohya)",
    ]
    tensors, metadata = read_safetensors("kohya.safetensors")
    assert tensors.keys() == golden("kohya").keys()
    assert metadata == {"format": "pt", "trained_by": "hand"}
    read, expected = (
        low_rank_changes(parse_adapter(file, {}, "a").stage_c) for file in (tensors, golden("kohya"))
    )
    assert all(relative_error(read[layer].delta(), expected[layer].delta()) <= 1e-6 for layer in expected)


def test_the_official_dialect_asks_for_its_stage_c(folder, capsys):
    write_safetensors("kohya.safetensors", golden("kohya"), {})
    error = failing("kohya.safetensors", "a.safetensors", "--to", "official", capsys=capsys)
    assert "none of the published sizes (3.6 B, 1 B)" in error
    assert convert("kohya.safetensors", "a.safetensors", "--to", "official", *MODEL) == 0
    _, metadata = read_safetensors("a.safetensors")
    assert json.loads(metadata["order"]) == ABOUT["order"]
    assert convert("a.safetensors", "again.safetensors", "--to", "onetrainer") == 0
    assert metadata["rank"] == "3"
    assert "order" not in read_safetensors("again.safetensors")[1]
    assert len(read_adapter("again.safetensors").stage_c) == 24


def test_nothing_is_overwritten_unless_asked(folder, capsys):
    (folder / "there.safetensors").write_text("mine")
    options = ("--to", "kohya", *MODEL, "--without", "tokens")
    assert (
        "there.safetensors is there already; choose another name, or overwrite it with --force."
        in failing("official.safetensors", "there.safetensors", *options, capsys=capsys)
    )
    assert (folder / "there.safetensors").read_text() == "mine"
    assert convert("official.safetensors", "there.safetensors", *options, "--force") == 0
    assert len(read_adapter("there.safetensors").stage_c) == 24


def test_a_file_onto_itself(folder):
    options = ("--to", "peft", *MODEL, "--without", "tokens", "--force")
    assert convert("official.safetensors", "official.safetensors", *options) == 0
    assert read_adapter("official.safetensors").dialect == "peft"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("official.safetensors", "a.safetensors", "--to", "koya"),
         "There is no LoRA dialect 'koya'; did you mean kohya?"),
        (("official.safetensors", "a.safetensors", "--to", "x"),
         "There is no LoRA dialect 'x'; choose one of official, kohya,"),
        (("official.safetensors", "a.pt", "--to", "kohya"),
         "a.pt is to be a safetensors file; give it a name that ends in .safetensors."),
        (("missing.safetensors", "stage_c.safetensors/a.safetensors", "--to", "kohya"),
         "stage_c.safetensors/a.safetensors could not be written (Not a directory), and nothing was changed there;"),
        (("missing.safetensors", "a.safetensors", "--to", "kohya"), "missing.safetensors does not exist;"),
        (("official.safetensors", "a.safetensors", "--to", "kohya"), "give the Stage C that it was made for"),
        (("official.safetensors", "a.safetensors", "--to", "kohya", "--model", "official.safetensors"),
         "official.safetensors is a LoRA, but Stage C is expected here; choose a Stage C file."),
        (("official.safetensors", "a.safetensors", "--to", "kohya", *MODEL),
         "official.safetensors holds 2 changes of the vocabulary's tokens, which the dialect kohya has no keys for; "
         "choose one that can (official), or leave them out."),
        (("official.safetensors", "a.safetensors", "--to", "kohya", *MODEL, "--without", "tokens", "--without",
          "stage_c"),
         "Nothing of official.safetensors is left to write; leave out less (--without)."),
        (("stage_c.safetensors", "a.safetensors", "--to", "kohya"),
         "stage_c.safetensors holds the weights of Stage C, but a LoRA is expected here; choose one."),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert message in failing(*arguments, capsys=capsys)
    assert sorted(folder.iterdir()) == before


def test_a_partial_match_is_converted_only_when_asked(folder, capsys):
    layers = {"down_blocks_0_2_attention_attn_to_q": (64, 64), "a": (4, 4)}
    write_safetensors("part.safetensors", kohya_file(layers), {})
    error = failing("part.safetensors", "a.safetensors", "--to", "omi", capsys=capsys)
    assert "part.safetensors holds 3 tensors that no layer" in error
    assert "Nothing was written; --partial converts the rest." in error
    assert not (folder / "a.safetensors").exists()
    assert convert("part.safetensors", "a.safetensors", "--to", "omi", "--partial") == 0
    assert "part.safetensors holds 3 tensors that no layer" in capsys.readouterr().out
    assert list(read_adapter("a.safetensors").stage_c) == ["down_blocks.0.2.attention.attn.to_q"]


def test_layers_that_the_model_lacks(folder, capsys):
    write_safetensors("wide.safetensors", kohya_file({"clf_1": (16, 2048)}), {})
    error = failing("wide.safetensors", "a.safetensors", "--to", "omi", *MODEL, capsys=capsys)
    assert (
        "wide.safetensors is a LoRA for another Stage C: of the 1 layers that it changes 1 have another size"
        in error
    )


def test_help_lists_the_dialects(capsys):
    with pytest.raises(SystemExit) as end:
        convert("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and dialect.about in text for name, dialect in DIALECTS.items())
