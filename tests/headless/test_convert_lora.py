"""`cascade convert-lora`: what it says, writes and refuses."""

import json

import pytest
import torch

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import DIALECTS, parse_adapter, read_adapter, to_dialect
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.adapters.names import published_layers
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
         "choose one that can (official), or leave them out (--without tokens in cascade convert-lora)."),
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
    assert "part.safetensors holds 3 tensors of no known layer" in error
    assert "Nothing was written; --partial converts the rest." in error
    assert not (folder / "a.safetensors").exists()
    assert convert("part.safetensors", "a.safetensors", "--to", "omi", "--partial") == 0
    assert "part.safetensors holds 3 tensors of no known layer" in capsys.readouterr().out
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


PEFT = ("--to", "peft", *MODEL, "--without", "tokens")


def test_peft_gets_its_folder(folder, capsys):
    assert convert("official.safetensors", "style", *PEFT) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "Left out: tokens",
        "Written: style/adapter_model.safetensors (peft)",
        "Written: style/adapter_config.json",
    ]
    config = json.loads((folder / "style" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["rank_pattern"]) == (
        "LORA",
        3,
        3,
        {},
    )
    assert len(config["target_modules"]) == 24
    written = {path: path.read_bytes() for path in (folder / "style").iterdir()}
    for again in ("style", "style/adapter_model.safetensors"):
        assert "is there already" in failing("official.safetensors", again, *PEFT, capsys=capsys)
        assert convert("official.safetensors", again, *PEFT, "--force") == 0
        assert {path: path.read_bytes() for path in (folder / "style").iterdir()} == written
        capsys.readouterr()


def test_the_folder_that_peft_reads_is_read(folder, capsys):
    assert convert("official.safetensors", "style", *PEFT) == 0
    assert convert("style", "a.safetensors", "--to", "kohya") == 0
    assert convert("style/adapter_model.safetensors", "b.safetensors", "--to", "kohya") == 0
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["show", "style"]) == 0
    assert capsys.readouterr().out.startswith(
        "adapter_model.safetensors (peft): 24 layers of Stage C, rank 3"
    )


def test_a_file_for_peft_states_its_own_alpha_and_touches_nothing_beside_it(folder, capsys):
    (folder / "adapter_config.json").write_text("another's")
    for name, *force in (("style.safetensors",), ("b.safetensors",), ("b.safetensors", "--force")):
        assert convert("official.safetensors", name, *PEFT, *force) == 0
        assert "an OUT that does not end in .safetensors" in capsys.readouterr().out
        assert read_adapter(name).notes == ()
    assert (folder / "adapter_config.json").read_text() == "another's"
    assert convert("style.safetensors", "back.safetensors", "--to", "kohya") == 0
    assert "lora_adapter_metadata" not in read_safetensors("back.safetensors")[1]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_configuration_of_another_adapter_is_left_alone(force, folder, capsys):
    """It lies in a folder of its name, or beside tensors of its own of another kind."""
    (folder / "adapter_config.json").write_text("another's")
    before = sorted(folder.iterdir())
    for target in (".", "adapter_model.safetensors"):
        error = failing("official.safetensors", target, *PEFT, *force, capsys=capsys)
        assert (
            "adapter_config.json is there already, of another adapter than adapter_model.safetensors" in error
        )
    assert sorted(folder.iterdir()) == before
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()  # which no file can replace
    (folder / "adapter_model.safetensors").write_text("mine")
    assert failing("official.safetensors", ".", *PEFT, *force, capsys=capsys)
    assert (folder / "adapter_model.safetensors").read_text() == "mine"


def test_fp8_is_converted_and_nan_is_not(folder, capsys):
    low_rank = {key: t.to(torch.float8_e4m3fn) for key, t in golden("kohya").items()}
    write_safetensors("fp8.safetensors", low_rank, {})
    assert convert("fp8.safetensors", "a.safetensors", "--to", "onetrainer") == 0
    written = low_rank_changes(read_adapter("a.safetensors").stage_c)
    for layer, change in low_rank_changes(read_adapter("fp8.safetensors").stage_c).items():
        assert torch.equal(change.delta(), written[layer].delta())
    first = next(key for key in low_rank if key.endswith("up.weight"))
    for value in (torch.nan, torch.inf):
        sick = {**golden("kohya"), first: golden("kohya")[first] * value}
        write_safetensors("sick.safetensors", sick, {})
        capsys.readouterr()
        error = failing("sick.safetensors", "b.safetensors", "--to", "onetrainer", capsys=capsys)
        assert "sick.safetensors holds NaN or infinity in up of" in error
    assert not (folder / "b.safetensors").exists()


def test_what_no_dialect_holds_is_to_be_baked_in(folder, capsys):
    """PEFT's `modules_to_save`: nothing that can be left out would help."""
    whole = {"base_model.model.clf.1.weight": torch.ones(64, 64, 1, 1)}
    write_safetensors("whole.safetensors", whole, {})
    error = failing("whole.safetensors", "a.safetensors", "--to", "kohya", capsys=capsys)
    assert (
        "holds 1 changes by whole parameters, which the dialect kohya has no keys for; bake it into its"
        in error
    )
    text = {
        f"lora_te_text_projection.{part}": torch.ones(4, 4) for part in ("lora_up.weight", "lora_down.weight")
    }
    write_safetensors("both.safetensors", {**golden("kohya"), **text}, {})
    error = failing("both.safetensors", "a.safetensors", "--to", "peft", capsys=capsys)
    assert "or leave them out (--without text in cascade convert-lora)." in error


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        ("omi", "without using any of it; for it choose onetrainer"),
        ("onetrainer_first", "refuses its first dialect"),
    ],
)
def test_what_onetrainer_cannot_read_is_said(dialect, said, folder, capsys):
    write_safetensors("kohya.safetensors", golden("kohya"), {})
    assert convert("kohya.safetensors", "a.safetensors", "--to", dialect) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("dialect", ["kohya", "onetrainer", "comfyui", "diffusers"])
def test_what_comfyui_makes_of_dora_is_said(dialect, folder, capsys):
    name = "lora_unet_down_blocks_0_2_attention_attn_to_q"
    layer = {
        **kohya_file({name.removeprefix("lora_unet_"): (64, 64)}),
        f"{name}.dora_scale": torch.ones(64, 1),
    }
    write_safetensors("dora.safetensors", layer, {})
    assert convert("dora.safetensors", "a.safetensors", "--to", dialect) == 0
    assert ("ComfyUI's own LoRA nodes measure DoRA's rows" in capsys.readouterr().out) == (
        dialect != "diffusers"
    )


def test_alpha_and_module_filters_are_given(folder, capsys):
    shapes = [shape for layer, shape in published_layers(CONFIG).items() if layer.endswith("mapper_sca")]
    lone = {f"weights.{i}.lora_down": torch.randn(2, shape[1]) for i, shape in enumerate(shapes)}
    lone |= {f"weights.{i}.lora_up": torch.randn(shape[0], 2) for i, shape in enumerate(shapes)}
    write_safetensors("lone.safetensors", lone, {})
    arguments = ("lone.safetensors", "a.safetensors", "--to", "kohya", *MODEL)
    assert "could be those of mapper_sca or mapper_crp" in failing(*arguments, capsys=capsys)
    assert convert(*arguments, "--filters", "['mapper_crp']") == 0
    assert all(layer.endswith("mapper_crp") for layer in read_adapter("a.safetensors").stage_c)
    write_safetensors("renamed.safetensors", to_dialect(read_adapter("a.safetensors"), "peft")[0], {})
    capsys.readouterr()
    assert convert("renamed.safetensors", "b.safetensors", "--to", "kohya") == 0
    assert "states no alpha, and each layer's rank is taken for it" in capsys.readouterr().out
    assert convert("renamed.safetensors", "c.safetensors", "--to", "kohya", "--alpha", "6") == 0
    alphas = {
        key: tensor for key, tensor in read_safetensors("c.safetensors")[0].items() if key.endswith("alpha")
    }
    assert {float(alpha) for alpha in alphas.values()} == {6.0}
    capsys.readouterr()
    assert "alpha is nan; give a number" in failing(
        "renamed.safetensors", "d.safetensors", "--to", "kohya", "--alpha", "nan", capsys=capsys
    )


def test_show_tells_of_a_lora(folder, capsys):
    write_safetensors("kohya.safetensors", golden("kohya"), {"modelspec.trigger_phrase": "[fernando]"})
    assert main(["show", "kohya.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "kohya.safetensors says of itself: trigger words [fernando]."
    )
