"""Files that PEFT wrote, read as PEFT merges them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import check_finite_adapter, parse_adapter, read_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.tests.core.test_adapters_published import CONFIG
from cascade_nodes.tests.golden_weights import relative_error

FILES = Path(__file__).parents[1] / "data" / "adapters"
LAYERS = {
    "down_blocks.0.2.attention.to_q": "down_blocks.0.2.attention.attn.to_q",
    "up_blocks.1.2.attention.to_out.0": "up_blocks.1.2.attention.attn.out_proj",
    "clf.1": "clf.1",
}


@pytest.mark.parametrize("kind", ["lora", "adalora", "adalora_pruned"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_peft_file_changes_what_peft_changes(kind, renamed, tmp_path):
    """LoRA with rsLoRA, ranks and alphas of single layers; AdaLoRA, whole and with a singular value left out."""
    folder = FILES / f"peft_{kind}"
    expected, _ = read_safetensors(folder / "expected.safetensors")
    path = tmp_path / ("style.safetensors" if renamed else "adapter_model.safetensors")
    shutil.copy(folder / "adapter_model.safetensors", path)
    shutil.copy(folder / "adapter_config.json", tmp_path)
    adapter = read_adapter(path)
    assert (adapter.dialect, adapter.unknown, len(adapter.notes)) == ("peft", (), int(renamed))
    for theirs, ours in LAYERS.items():
        change, weight = adapter.stage_c.get(ours), expected[f"{theirs}.weight"]
        made = torch.zeros_like(weight) if change is None else change.apply(torch.zeros_like(weight), 1.0)
        assert torch.equal(made, weight) if change is None else relative_error(made, weight) <= 1e-5


def test_without_its_configuration_alpha_is_given(tmp_path):
    path = tmp_path / "style.safetensors"
    shutil.copy(FILES / "peft_adalora" / "adapter_model.safetensors", path)
    expected, _ = read_safetensors(FILES / "peft_adalora" / "expected.safetensors")
    assert "states no alpha" in read_adapter(path).notes[0]
    change = read_adapter(path, alpha=6).stage_c["down_blocks.0.2.attention.attn.to_q"]
    weight = expected["down_blocks.0.2.attention.to_q.weight"]
    assert relative_error(change.apply(torch.zeros_like(weight), 1.0), weight) <= 1e-5


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_peft_changes_the_weights_for_is_refused(kind):
    with pytest.raises(
        CascadeError, match=rf"states a LoRA with init_lora_weights '{kind}', for which PEFT changes"
    ):
        read_adapter(FILES / f"peft_{kind}" / "adapter_model.safetensors")


def test_adalora_whose_singular_values_were_taken_out_is_refused(tmp_path):
    tensors, _ = read_safetensors(FILES / "peft_adalora" / "adapter_model.safetensors")
    path = tmp_path / "adapter_model.safetensors"
    write_safetensors(path, {key: t for key, t in tensors.items() if not key.endswith("lora_E")}, {})
    shutil.copy(FILES / "peft_adalora" / "adapter_config.json", tmp_path)
    with pytest.raises(
        CascadeError, match=r"to_q is of an AdaLoRA adapter, but its lora_E \(4, 1\) is not there"
    ):
        read_adapter(path)


NOT_READ = json.loads((FILES / "peft_not_read.json").read_text())
NAMES = {"Bone": "MiSS", "C3A": "C³A", "LN": "LayerNorm tuning"}


def in_folder(
    folder: Path, config: object, tensors: dict[str, torch.Tensor], name: str = "adapter_model.safetensors"
):
    write_safetensors(folder / name, tensors, {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_refused_by_its_name_with_its_configuration(kind, name, tmp_path):
    zeros = {key: torch.zeros(shape) for key, shape in NOT_READ[kind]["shapes"].items()}
    path = in_folder(tmp_path, NOT_READ[kind]["config"], zeros, name)
    with pytest.raises(CascadeError, match=f"is an adapter of another kind, {NAMES.get(kind, kind)} "):
        read_adapter(path)


def lora_config(**entries: object) -> dict[str, object]:
    return {**json.loads((FILES / "peft_lora" / "adapter_config.json").read_text()), **entries}


@pytest.mark.parametrize(
    ("peft_type", "words"),
    [
        (["LORA"], r"states the peft_type \['LORA'\], but one word such as LORA is expected"),
        ({}, "states the peft_type {}, but one word"),
        (1, "states the peft_type 1, but one word"),
        ("NEW_LORA", r"another kind, NEW_LORA \(by its configuration\), which is not read"),
        ("XLORA", "another kind, XLORA"),
    ],
)
def test_a_type_that_is_none_or_not_known(peft_type, words, tmp_path):
    tensors, _ = read_safetensors(FILES / "peft_lora" / "adapter_model.safetensors")
    with pytest.raises(CascadeError, match=words):
        read_adapter(in_folder(tmp_path, lora_config(peft_type=peft_type), tensors))


def assert_as_merged(adapter):
    expected, _ = read_safetensors(FILES / "peft_lora" / "expected.safetensors")
    for theirs, ours in LAYERS.items():
        weight = expected[f"{theirs}.weight"]
        assert relative_error(adapter.stage_c[ours].apply(torch.zeros_like(weight), 1.0), weight) <= 1e-5


def test_diffusers_metadata_states_alpha_for_its_network(tmp_path):
    """rsLoRA, and an alpha of one layer, behind `prior.`"""
    adapter = read_adapter(FILES / "diffusers_prior.safetensors")
    assert (adapter.dialect, adapter.unknown, adapter.notes) == ("diffusers", (), ())
    assert_as_merged(adapter)
    tensors, metadata = read_safetensors(FILES / "diffusers_prior.safetensors")
    for network in ("unet", "base_model.model.prior"):  # of another network, and with PEFT's prefix as well
        renamed = {key.replace("prior", network, 1): tensor for key, tensor in tensors.items()}
        header = (
            metadata
            if "prior" in network
            else {key: text.replace('"prior.', f'"{network}.') for key, text in metadata.items()}
        )
        write_safetensors(tmp_path / "a.safetensors", renamed, header)
        assert_as_merged(read_adapter(tmp_path / "a.safetensors"))
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    assert "states no alpha" in read_adapter(tmp_path / "a.safetensors").notes[0]


def test_fan_in_fan_out_is_left_out_as_in_peft(tmp_path):
    """PEFT takes it back for linear layers and convolutions, which all of these are."""
    tensors, _ = read_safetensors(FILES / "peft_lora" / "adapter_model.safetensors")
    adapter = read_adapter(in_folder(tmp_path, lora_config(fan_in_fan_out=True), tensors))
    assert "states fan_in_fan_out, which PEFT itself leaves out" in adapter.notes[0]
    assert_as_merged(adapter)


@pytest.mark.parametrize("wrapper", ["module.", "module.module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_counters_are_as_around_networks(wrapper, tmp_path):
    tensors, _ = read_safetensors(FILES / "peft_lora" / "adapter_model.safetensors")
    wrapped = {wrapper + key: tensor for key, tensor in tensors.items()}
    counters = {"step": torch.tensor(5), "epoch": torch.tensor([1.0]), "ema.decay": torch.tensor(0.9)}
    adapter = read_adapter(in_folder(tmp_path, lora_config(), {**wrapped, **counters}))
    assert (adapter.unknown, adapter.notes) == ((), ())
    assert_as_merged(adapter)


@pytest.mark.parametrize("prefix", ["generator.", "model.diffusion_model.", "module.prior."])
def test_networks_wrappers_before_names(prefix, tmp_path):
    tensors, _ = read_safetensors(FILES / "diffusers_prior.safetensors")
    write_safetensors(
        tmp_path / "a.safetensors", {prefix + key.removeprefix("prior."): t for key, t in tensors.items()}, {}
    )
    assert read_adapter(tmp_path / "a.safetensors").stage_c.keys() == set(LAYERS.values())


def test_a_layer_that_stands_twice_once_wrapped():
    tensors, _ = read_safetensors(FILES / "diffusers_prior.safetensors")
    key, tensor = next(iter(tensors.items()))
    with pytest.raises(CascadeError, match=r"a: .* stands twice, once as module\."):
        parse_adapter({**tensors, f"module.{key}": tensor}, {}, "a")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_fp8_holds_the_values_that_it_holds(dtype, tmp_path):
    tensors, _ = read_safetensors(FILES / "peft_lora" / "adapter_model.safetensors")
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    adapter = read_adapter(in_folder(tmp_path, lora_config(), stored))
    check_finite_adapter(adapter)
    exact = parse_adapter({key: t.float() for key, t in stored.items()}, {}, "a", alpha=None)
    for layer, change in adapter.stage_c.items():
        assert torch.equal(change.tensors()["up"].float(), exact.stage_c[layer].tensors()["up"])
    if dtype.itemsize == 1:
        next(iter(stored.values())).view(torch.uint8).fill_(127)  # NaN in both
        with pytest.raises(CascadeError, match="holds NaN or infinity in"):
            check_finite_adapter(read_adapter(in_folder(tmp_path, lora_config(), stored)))


def test_whole_modules_in_the_spelling_of_a_model_in_memory():
    file = {
        f"base_model.model.clf.1.modules_to_save.default.{part}": torch.ones(4) for part in ("weight", "bias")
    }
    assert parse_adapter(file, {}, "a").stage_c.keys() == {"clf.1", "clf.1.bias"}


@pytest.mark.parametrize("given", [{"alpha": 8.0}, {"filters": ".attn"}])
def test_what_is_given_without_effect_is_said(given, tmp_path):
    tensors, _ = read_safetensors(FILES / "diffusers_prior.safetensors")
    stems = {key.rpartition(".lora_")[0] for key in tensors}
    write_safetensors(
        tmp_path / "own.safetensors", {**tensors, **{f"{s}.alpha": torch.tensor(2.0) for s in stems}}, {}
    )
    (note,) = read_adapter(tmp_path / "own.safetensors", **given).notes
    assert "effect" in note
    assert read_adapter(tmp_path / "own.safetensors").notes == ()
    if "alpha" in given:
        write_safetensors(tmp_path / "none.safetensors", tensors, {})
        assert read_adapter(tmp_path / "none.safetensors", **given).notes == ()
        assert (
            "no effect"
            in read_adapter(FILES / "official_attn.safetensors", alpha=8.0, stage_c=CONFIG).notes[0]
        )


def test_the_adapters_name_in_a_model_in_memory(tmp_path):
    tensors, _ = read_safetensors(FILES / "peft_lora" / "adapter_model.safetensors")
    for name in ("default", "my-style"):
        named = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in tensors.items()}
        assert_as_merged(read_adapter(in_folder(tmp_path, lora_config(), named)))
    with pytest.raises(CascadeError, match=r"lora_A\.weight stands twice, once as .*\.my-style\.weight"):
        parse_adapter({**tensors, **named}, {}, "a")


@pytest.mark.parametrize("ending", ["weight_scale", "scale_weight"])
def test_scales_beside_fp8_count(ending):
    tensors, _ = read_safetensors(FILES / "diffusers_prior.safetensors")
    scaled = {key: (tensor / 2).to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    scales = {key.removesuffix("weight") + ending: torch.tensor(2.0) for key in tensors}
    plain = parse_adapter({key: t.float() * 2 for key, t in scaled.items()}, {}, "a")
    for layer, change in parse_adapter({**scaled, **scales}, {}, "a").stage_c.items():
        assert torch.equal(change.tensors()["up"].float(), plain.stage_c[layer].tensors()["up"])


def test_a_kind_that_diffusers_metadata_states_is_refused(tmp_path):
    tensors, metadata = read_safetensors(FILES / "diffusers_prior.safetensors")
    header = {key: text.replace('"LORA"', '"VERA"') for key, text in metadata.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, header)
    with pytest.raises(CascadeError, match="another kind, VERA"):
        read_adapter(tmp_path / "a.safetensors")
