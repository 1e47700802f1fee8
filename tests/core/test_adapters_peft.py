"""Files that PEFT wrote, read as PEFT merges them."""

import shutil
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
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
