"""CascadeLoRAApply and what a file's training had: alpha, module_filters, and what its metadata says."""

import pytest
import torch

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import Adapter, LowRank, to_dialect
from cascade_nodes.cascade_core.adapters.names import published_layers
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.nodes.lora import CascadeLoRAApply
from cascade_nodes.tests.nodes.graph import load
from cascade_nodes.tests.nodes.tiny import CONFIGS

LAYER = "down_blocks.0.2.attention.attn.to_q"


@pytest.fixture(scope="module")
def stage_c(models, tmp_path_factory):
    """Stage C, with a PEFT file that lost its alpha, and an official one of `mapper_sca` or `mapper_crp`."""
    folder = tmp_path_factory.mktemp("models") / "loras"
    tensors, _ = to_dialect(
        Adapter("a", "kohya", {LAYER: LowRank(torch.ones(2, 32), torch.ones(32, 2))}), "peft"
    )
    write_safetensors(folder / "renamed.safetensors", tensors, {"modelspec.trigger_phrase": "[fernando]"})
    layers = published_layers(StageC.from_config(CONFIGS["stage_c"]).config)
    shapes = [shape for layer, shape in layers.items() if layer.endswith("mapper_sca")]
    official = {f"weights.{i}.lora_down": torch.ones(1, shape[1]) for i, shape in enumerate(shapes)}
    official |= {f"weights.{i}.lora_up": torch.ones(shape[0], 1) for i, shape in enumerate(shapes)}
    write_safetensors(folder / "official.safetensors", official, {})
    patch = pytest.MonkeyPatch()
    patch.setenv("CASCADE_MODELS", f"{models}:{folder.parent}")
    yield load()["stage_c"]
    patch.undo()


def apply(stage_c, file, **more):
    output = CascadeLoRAApply.execute(stage_c, file, 1.0, 1.0, None, **more)
    assert output.ui
    return output[0].patches[-1].changes, output.ui["text"]


def test_alpha_is_assumed_and_said_or_given(stage_c):
    changes, text = apply(stage_c, "renamed.safetensors")
    assert torch.equal(changes[LAYER].delta(), torch.full((32, 32), 2.0))
    assert text[1] == "renamed.safetensors says of itself: trigger words [fernando]."
    assert text[2].startswith("renamed.safetensors states no alpha, and each layer's rank is taken for it")
    changes, text = apply(stage_c, "renamed.safetensors", alpha=1.0)
    assert torch.equal(changes[LAYER].delta(), torch.ones(32, 32))
    assert len(text) == 2


def test_module_filters_settle_what_the_shapes_leave_open(stage_c):
    with pytest.raises(
        CascadeError, match="which could be those of mapper_sca or mapper_crp; give the module_filters"
    ):
        apply(stage_c, "official.safetensors")
    changes, _ = apply(stage_c, "official.safetensors", module_filters="['mapper_crp']")
    assert changes
    assert all(layer.endswith("mapper_crp") for layer in changes)
