"""What a LoRA can be made of: algorithms, DoRA, ranks and rates of layers, dropout, going on from a file."""

import copy
from pathlib import Path

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.adapters.changes import AddedChange, Kronecker, LowRank
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.state import STATE, read_state
from cascade_nodes.cascade_core.training.tasks.low_rank import matrix_size, select_layers
from cascade_nodes.tests.core.training_runs import loop_of, run_until_killed, same, settings_of, write_world

KINDS = {
    "lora": {"rank": 4, "alpha": 2.0},
    "dora": {"rank": 4, "dora": True},
    "loha": {"algorithm": "loha", "rank": 3, "alpha": 6.0},
    "loha, dora": {"algorithm": "loha", "rank": 3, "dora": True},
    "lokr": {"algorithm": "lokr", "rank": 2, "alpha": 3.0},
    "lokr of a factor": {"algorithm": "lokr", "rank": 64, "factor": 4},
    "lokr, dora": {"algorithm": "lokr", "rank": 2, "dora": True},
    "rslora": {"rank": 4, "rslora": True},
    "LoRA+": {"rank": 4, "up_learning_rate": 4.0},
    "ranks and rates": {
        "rank": 4,
        "alpha": 2.0,
        "ranks": {"attention": 2, "clip_txt_mapper": 6},
        "rates": {"up_blocks.*": 0.5, "attention": 0.25},
    },
    "dropout": {"rank": 4, "dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3, "text_encoder": True},
    "rows dropped": {"algorithm": "lokr", "rank": 2, "rank_dropout": 0.3, "module_dropout": 0.3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def of_kind(world, name, run, **sections):
    sections["train"] = {
        "learning_rate": 2e-2,
        "warmup": 0,
        "schedule": "constant",
        **sections.get("train", {}),
    }
    return settings_of(world, "lora", run, lora=KINDS[name], **sections)


@pytest.mark.parametrize("name", KINDS)
def test_the_file_is_what_was_trained_and_a_killed_run_goes_on(world, tmp_path, name):
    """Read by our own adapters and merged into the weights, it predicts what the trained network did."""
    whole = loop_of(of_kind(world, name, tmp_path / "whole"))
    plain = copy.deepcopy(whole.task.stage_c)
    for layer in plain.modules():
        layer._forward_hooks.clear()
        layer.__dict__.pop("low_rank", None)
    assert whole.run().finished
    settings = of_kind(world, name, tmp_path / "killed")
    run_until_killed(settings, 5)
    resumed = loop_of(settings)
    assert resumed.resume()
    resumed.run()
    states = [read_state(loop.folder / STATE)[0] for loop in (whole, resumed)]
    assert all(same(states[0][part], states[1][part]) for part in states[0])

    path = tmp_path / "out.safetensors"
    whole.task.write(whole.state, path, {})
    changes = read_adapter(path).stage_c
    assert len(changes) == len(select_layers(plain, ["all"]))
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 4, 6, generator=random)
    config = plain.config
    conditions = {
        "clip_text": torch.randn(2, 7, config.c_clip_text, generator=random),
        "clip_text_pooled": torch.randn(2, 1, config.c_clip_text_pooled, generator=random),
        "clip_img": torch.zeros(2, 1, config.c_clip_img),
    }
    r = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = plain(x, r, **conditions)
        with whole.task.using(whole.state) as network:
            trained = network(x, r, **conditions)
        assert whole.task.trained.training
        for target, change in changes.items():
            weight = plain.get_submodule(target).weight
            assert isinstance(change, AddedChange)
            weight.copy_(change.apply(weight, 1.0))
        merged = plain(x, r, **conditions)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, trained, atol=2e-5, rtol=1e-4)


def test_keys_are_those_of_lycoris(world, tmp_path):
    endings = {}
    for name in ("loha, dora", "lokr", "lokr of a factor"):
        loop = loop_of(of_kind(world, name, tmp_path / name))
        loop.task.write(loop.state, tmp_path / f"{name}.safetensors", {})
        tensors = read_safetensors(tmp_path / f"{name}.safetensors")[0]
        layer = "lora_unet_down_blocks_0_2_attention_attn_to_q"
        endings[name] = {key.removeprefix(layer) for key in tensors if key.startswith(f"{layer}.")}
    ends = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha", ".dora_scale")
    assert endings["loha, dora"] == set(ends)
    assert endings["lokr"] == {".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha"}
    assert endings["lokr of a factor"] == {".lokr_w1", ".lokr_w2", ".alpha"}


def test_ranks_and_rates_of_layers(world, tmp_path):
    settings = of_kind(world, "ranks and rates", tmp_path, train={"optimizer": "adamw"})
    loop = loop_of(settings)
    assert [group["share"] for group in loop.optimiser.param_groups] == [1.0, 0.25, 0.5]
    loop.task.write(loop.state, tmp_path / "out.safetensors", {})
    changes = read_adapter(tmp_path / "out.safetensors").stage_c
    attention = select_layers(loop.task.stage_c, ["attention"])
    for name, change in changes.items():
        assert isinstance(change, LowRank)
        rank = 2 if name in attention else 6 if name == "clip_txt_mapper" else 4
        assert (change.rank, change.alpha) == (rank, 2.0)
    plus = loop_of(of_kind(world, "LoRA+", tmp_path / "plus"))
    assert [group["share"] for group in plus.optimiser.param_groups] == [1.0, 4.0]


def test_rates_of_blocks_by_their_index(world, tmp_path):
    lora = {"rank": 4, "rates": {"down_blocks.0.*": 0.5, "up_blocks.0.1.*": 0.25}}
    loop = loop_of(settings_of(world, "lora", tmp_path, lora=lora))
    layers = select_layers(loop.task.stage_c, ["all"])
    sizes = {group["share"]: sum(p.numel() for p in group["params"]) for group in loop.optimiser.param_groups}
    for share, prefix in ((0.5, "down_blocks.0."), (0.25, "up_blocks.0.1.")):
        block = [layer for name, layer in layers.items() if name.startswith(prefix)]
        assert sizes[share] == sum(4 * sum(matrix_size(layer)) for layer in block) > 0
    assert sum(sizes.values()) == loop.trained_numbers


def test_rslora_scales_by_the_root_of_the_rank(world, tmp_path):
    loop = loop_of(of_kind(world, "rslora", tmp_path))
    loop.task.write(loop.state, tmp_path / "out.safetensors", {})
    changes = read_adapter(tmp_path / "out.safetensors").stage_c.values()
    assert {change.scale for change in changes if isinstance(change, LowRank)} == {2.0}  # 4 / sqrt(4)


def test_a_lokr_of_a_factor_has_no_rank(world, tmp_path):
    loop = loop_of(of_kind(world, "lokr of a factor", tmp_path))
    for change in loop.task.changes.as_adapter(loop.task.changes.values()).values():
        assert isinstance(change, Kronecker)
        assert change.rank is None
        assert max(change.left.shape) <= 4


@pytest.mark.parametrize("name", ["dropout", "rows dropped"])
def test_dropout_is_drawn_again_in_a_backward_pass(world, tmp_path, name):
    """Gradient checkpointing computes what was computed, so that the weights come out the same."""
    states = []
    for checkpointing in (False, True):
        sections = {"train": {"gradient_checkpointing": checkpointing, "steps": 2}}
        loop = loop_of(of_kind(world, name, tmp_path / str(checkpointing), **sections))
        loop.run()
        states.append(dict(loop.state))
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "lokr of a factor", "rslora"])
def test_going_on_from_a_file(world, tmp_path, name):
    """The run begins as the file was, even where the new run scales otherwise."""
    train(of_kind(world, name, tmp_path / "first", train={"steps": 2}))
    file = str(tmp_path / "first" / "out.safetensors")
    kind = {**KINDS[name], "alpha": 5.0, "start": file}
    if name in ("lora", "rslora", "dora"):
        kind["rank"] = 6  # two further ranks, which begin with no change
    loop = loop_of(settings_of(world, "lora", tmp_path / "second", lora=kind, train={"steps": 2}))
    loop.task.write(loop.state, tmp_path / "out.safetensors", {})
    before, after = (read_adapter(path).stage_c for path in (file, tmp_path / "out.safetensors"))
    for layer, change in before.items():
        weight = loop.task.stage_c.get_submodule(layer).weight
        torch.testing.assert_close(
            after[layer].apply(weight, 1.0), change.apply(weight, 1.0), atol=1e-6, rtol=1e-5
        )
    assert loop.run().finished
    contents = loop_of(settings_of(world, "lora", tmp_path / "third", lora=kind))
    assert contents.step == 0


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("lora", {"rank": 4, "targets": ["attention"]}, "layers that lora.targets leaves out"),
        ("lora", {"rank": 2}, "is trained; give the rank of the file or more."),
        ("lora", {"algorithm": "loha", "rank": 4}, "is a change by LoRA, but lora.algorithm makes LoHa"),
        ("dora", {"rank": 4}, "has DoRA's magnitudes of rows; give dora: true"),
        ("loha", {"algorithm": "loha", "rank": 4}, "is trained; give the rank of the file."),
        ("dropout", {"rank": 4}, "holds changes of the text encoder, which would be lost; give text_encoder"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with(world, tmp_path, first, second, sentence):
    train(of_kind(world, first, tmp_path / "first", train={"steps": 1}))
    start = str(tmp_path / "first" / "out.safetensors")
    with pytest.raises(CascadeError) as error:
        loop_of(settings_of(world, "lora", tmp_path / "second", lora={**second, "start": start}))
    assert sentence in str(error.value)


def test_another_file_to_go_on_from_is_another_run(world, tmp_path):
    train(of_kind(world, "lora", tmp_path / "a", train={"steps": 1}))
    train(of_kind(world, "lora", tmp_path / "b", train={"steps": 2}))
    files = [str(tmp_path / run / "out.safetensors") for run in "ab"]
    for file, refused in ((files[0], False), (files[1], True)):
        settings = settings_of(
            world, "lora", tmp_path / "run", lora={**KINDS["lora"], "start": file}, train={"steps": 1}
        )
        if refused:
            with pytest.raises(CascadeError, match="start file "):
                train(settings)
        else:
            train(settings)
    assert Path(files[0]).is_file()


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"ranks": {"attention": 0}}, "must be at least 1"),
        ({"ranks": {"attention": "x"}}, "lora.ranks.attention is 'x', but a whole number is expected."),
        ({"rates": {"attention": -1}}, "must be above 0"),
        ({"algorithm": "loha", "dropout": 0.1}, "are of the algorithm lora; loha has rank_dropout"),
        ({"dropout": 1.0}, "lora.dropout is 1.0; it must be at least 0 and below 1."),
    ],
)
def test_settings_of_a_lora_that_are_refused(world, tmp_path, lora, sentence):
    with pytest.raises(CascadeError) as error:
        settings_of(world, "lora", tmp_path, lora=lora)
    assert sentence in str(error.value)


def test_patterns_are_bounded(world, tmp_path):
    network = loop_of(of_kind(world, "lora", tmp_path)).task.stage_c
    with pytest.raises(CascadeError, match=r"lora.targets has 201 patterns; give at most 200."):
        select_layers(network, ["all"] * 201)
    with pytest.raises(CascadeError, match=r"has 201 characters; give at most 200."):
        select_layers(network, ["*a" * 100 + "b"])
    with pytest.raises(CascadeError, match="matches none of the"):
        select_layers(network, ["*a" * 99 + "b"])
