"""ControlNet: parity with the published networks, other sizes, inference from shapes, training."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import load_model, read_safetensors, write_safetensors
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.hints.control import check_hint, fit_hint
from cascade_nodes.cascade_core.hints.kinds import KINDS, Backbone, KindName, kind_of
from cascade_nodes.cascade_core.networks.controlnet import ControlNet
from cascade_nodes.cascade_core.networks.inference import infer_controlnet
from cascade_nodes.cascade_core.stages.control import ControlNetStage
from cascade_nodes.cascade_core.stages.device import ComputeDevice
from cascade_nodes.cascade_core.stages.hint import Control, make_hint
from cascade_nodes.cascade_core.training.data.hints import MAKERS
from cascade_nodes.tests.golden_weights import (
    fill_hashed,
    manifest_shapes,
    module_shapes,
    read_golden,
    relative_error,
)

PUBLISHED = {  # golden file -> its checkpoint's manifest
    "controlnet_canny": "controlnet_canny",
    "controlnet_inpaint": "controlnet_inpainting",
    "controlnet_super_resolution": "controlnet_super_resolution",
    "controlnet_identity": "controlnet_identity",
}
STAGES = [["fused", 1, 3, 1, 8, 1], ["fused", 4, 3, 2, 12, 1], ["mbconv", 4, 3, 2, 16, 2]]
SMALL = {
    "effnet": {"c_in": 1, "stem": 8, "stages": [["mbconv", 2, 3, 2, 12, 1], *STAGES], "c_last": 32},
    "effnet_rgb": {"c_in": 3, "bottleneck_mode": "effnet", "stem": 4, "stages": STAGES, "c_last": 16},
    "large": {"c_in": 4, "bottleneck_mode": "large", "c_wide": 64, "c_hidden": 16, "layers": 2, "c_last": 24},
    "simple": {"c_in": 6, "bottleneck_mode": "simple"},
    "simple_other": {"c_in": 6, "bottleneck_mode": "simple", "c_wide": 10, "c_last": 8},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    golden, metadata = read_golden(name)
    with torch.device("meta"):
        model = ControlNet.from_config(metadata["config"])
    with torch.no_grad():
        residuals = fill_hashed(model)(golden["in.x"])
    blocks = metadata["config"]["proj_blocks"]
    assert len(residuals) == max(blocks) + 1
    assert [block for block, residual in enumerate(residuals) if residual is not None] == blocks
    for block in blocks:
        reference = golden[f"out.{block}"]  # every 16th or 64th channel
        residual = residuals[block]
        sampled = residual[:, :: residual.shape[1] // reference.shape[1]]
        assert relative_error(sampled, reference) <= 1e-5, f"block {block}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_recognised_and_load_strictly(name):
    _, metadata = read_golden(name)
    shapes = manifest_shapes(PUBLISHED[name])
    config = infer_controlnet(shapes)
    assert config is not None
    assert config == {"c_proj": 2048, "bottleneck_mode": "effnet", **metadata["config"]}
    with torch.device("meta"):
        model = ControlNet.from_config(config)
    assert list(module_shapes(model).items()) == list(shapes.items())  # in the published order, too


@pytest.mark.parametrize("name", ["canny", "inpainting", "super_resolution", "identity"])  # those of files
def test_the_table_of_kinds_states_the_published_networks(name):
    kind = KINDS[name]
    config = infer_controlnet(manifest_shapes(f"controlnet_{kind.name}"))
    assert config is not None
    assert (config["c_in"], config["bottleneck_mode"]) == (kind.channels, kind.backbone)
    assert kind_of(kind.channels) is kind


def test_the_table_of_kinds_is_whole():
    assert set(get_args(KindName)) == KINDS.keys() == MAKERS.keys()
    assert {kind.backbone for kind in KINDS.values()} == set(get_args(Backbone))
    assert kind_of(7) is None


# The door does not find faces, so an identity hint is given to it.
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"identity"}))
def test_the_front_door_makes_the_hint_of_every_kind(name):
    kind, picture = KINDS[name], torch.rand(1, 64, 96, 3)
    with torch.device("meta"):
        network = ControlNet.from_config(
            {"c_in": kind.channels, "proj_blocks": [0], "bottleneck_mode": kind.backbone}
        )
    compressor = SimpleNamespace(encode=lambda pictures: torch.rand(1, 16, 2, 3))
    stage = ControlNetStage(network, f"{name}.safetensors", ComputeDevice("cpu"))
    control = Control(stage.file, picture, mask=torch.ones(1, 64, 96))
    hint = make_hint(control, stage, (96, 64), None, None, lambda: compressor)  # type: ignore[arg-type]
    check_hint(network.config, stage.file, hint.shape[1])
    assert fit_hint(hint, network.config, (2, 3)).shape[:2] == (1, kind.channels)


def test_other_files_are_not_controlnets():
    for checkpoint in ("stage_c_1b", "stage_b_700m", "stage_a", "previewer", "effnet_encoder"):
        assert infer_controlnet(manifest_shapes(checkpoint)) is None
    for checkpoint in PUBLISHED.values():
        shapes = manifest_shapes(checkpoint)
        assert infer_controlnet({**shapes, "projections.0.0.weight": (320, 320, 1, 1)}) is None
        assert infer_controlnet({k: v for k, v in shapes.items() if not k.startswith("backbone.")}) is None
        assert infer_controlnet({k: v for k, v in shapes.items() if not k.startswith("projections.")}) is None
    assert infer_controlnet({}) is None


@pytest.mark.parametrize("name", SMALL)
def test_other_sizes_run_and_are_inferred(name):
    config = {"c_proj": 20, "proj_blocks": [0, 1, 2], **SMALL[name]}
    model = ControlNet.from_config(config).eval()
    shapes = module_shapes(model)
    inferred = infer_controlnet(shapes)
    assert inferred is not None
    if name.startswith("effnet"):  # strides leave no trace: what is assumed halves in the last four stages
        assert all(row[3] == 2 for row in inferred["stages"])
        inferred["stages"] = [
            [*row[:3], stated[3], *row[4:]]
            for row, stated in zip(inferred["stages"], config["stages"], strict=True)
        ]
    # Shapes do not tell the blocks.
    assert inferred == {
        "bottleneck_mode": "effnet",
        **config,
        "proj_blocks": [],
    }
    with torch.no_grad():
        residuals = model(torch.rand(2, config["c_in"], 64, 32))
    size = {"effnet": (4, 2), "effnet_rgb": (8, 4)}.get(name, (64, 32))
    assert [residual.shape for residual in residuals] == [(2, 20, *size)] * 3


@pytest.fixture
def file(tmp_path):
    """A ControlNet for three blocks, as the published trainer saves it: nothing says which."""
    network = ControlNet.from_config({"c_proj": 20, "proj_blocks": [2, 5, 9], **SMALL["simple"]})
    write_safetensors(tmp_path / "net.safetensors", network.state_dict(), {})
    return tmp_path / "net.safetensors"


def test_other_blocks_are_never_guessed(file):
    message = r"net\.safetensors: nothing says which of Stage C's residual blocks .* a YAML file of its name beside it"
    with pytest.raises(CascadeError, match=message):
        load_model(file, expect="controlnet")


@pytest.mark.parametrize("settings", [
    "controlnet_blocks: [2, 5, 9]",
    "model_version: 3.6B\ncontrolnet_blocks: [2,5,\n  9]  # mine\nother: [1]\n",
    "controlnet_blocks:\n  - 2\n  - 5\n  - 9\nlr: 1.0e-4\n",
])  # fmt: skip
def test_the_trainings_settings_beside_it_say_which_blocks(settings, file):
    file.with_suffix(".yaml").write_text(settings)
    _, _, config = load_model(file, expect="controlnet")
    assert config["proj_blocks"] == [2, 5, 9]


def test_a_files_own_metadata_says_which_blocks(file):
    tensors, _ = read_safetensors(file)
    file.with_suffix(".yaml").write_text("controlnet_blocks: [0, 1, 2]")
    for number, metadata in enumerate(
        ({"controlnet_blocks": "[2, 5, 9]"}, {"config": '{"proj_blocks": [2, 5, 9]}'})
    ):
        write_safetensors(file.with_name(f"{number}.safetensors"), tensors, metadata)
        _, _, config = load_model(file.with_name(f"{number}.safetensors"), expect="controlnet")
        assert config["proj_blocks"] == [2, 5, 9]


@pytest.mark.parametrize("settings", ["controlnet_blocks: all", "controlnet_blocks: []", "controlnet_blocks: [a]",
                                      "controlnet_blocks: [1, 1]", "controlnet_blocks: [1, 999999999]"])  # fmt: skip
def test_settings_that_name_no_blocks(settings, file):
    file.with_suffix(".yaml").write_text(settings)
    with pytest.raises(
        CascadeError, match=r"controlnet_blocks; write the numbers|proj_blocks is .*, expected"
    ):
        load_model(file, expect="controlnet")


def test_gaps_are_none():
    config = {"c_in": 2, "c_proj": 3, "proj_blocks": [4, 1], "bottleneck_mode": "simple"}
    model = ControlNet.from_config(config)
    residuals = model(torch.rand(1, 2, 4, 4))
    assert [residual is None for residual in residuals] == [True, False, True, True, False]
    # The first projection is that of the first named block.
    torch.nn.init.ones_(model.get_parameter("projections.0.2.weight"))
    residuals = model(torch.rand(1, 2, 4, 4))
    assert residuals[4].abs().max() > 0
    assert residuals[1].abs().max() == 0


@pytest.mark.parametrize(("c_in", "padding"), [(1, 0), (3, 1), (4, 0)])
def test_only_three_channels_keep_the_stem_padding(c_in, padding):
    with torch.device("meta"):
        model = ControlNet.from_config({"c_in": c_in, "proj_blocks": [0]})
    assert model.get_submodule("backbone.0.0").padding == (padding, padding)


@pytest.mark.parametrize("name", SMALL)
def test_training_starts_from_nothing_and_reaches_every_layer(name):
    torch.manual_seed(0)
    model = ControlNet.from_config({"c_proj": 5, "proj_blocks": [0, 2], **SMALL[name]}).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    hint, target = torch.rand(4, SMALL[name]["c_in"], 64, 64), torch.randn(5, 1, 1)
    losses = []
    for step in range(3):
        residuals = model(hint)
        if step == 0:
            assert residuals[0].abs().max() == residuals[2].abs().max() == 0
        loss = (residuals[0] - target).square().mean() + (residuals[2] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_bad_configs_are_refused():
    with pytest.raises(CascadeError, match="proj_blocks is \\[\\], expected"):
        ControlNet.from_config({"c_in": 3})
    with pytest.raises(CascadeError, match="proj_blocks is \\[1, 1\\], expected"):
        ControlNet.from_config({"c_in": 3, "proj_blocks": [1, 1]})
    with pytest.raises(CascadeError, match="'huge', expected one of effnet, large, simple"):
        ControlNet.from_config({"c_in": 3, "proj_blocks": [0], "bottleneck_mode": "huge"})
    with pytest.raises(CascadeError, match="c_input"):
        ControlNet.from_config({"c_input": 3, "proj_blocks": [0]})
