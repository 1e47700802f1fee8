"""Every task learns, and its file gives exactly what was trained."""

import shutil
from dataclasses import replace

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError, ControlNet, StageC
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.adapters.changes import low_rank_changes
from cascade_nodes.cascade_core.checkpoints import load_model
from cascade_nodes.cascade_core.diffusion.guidance import guide
from cascade_nodes.cascade_core.hints.kinds import KINDS
from cascade_nodes.cascade_core.networks.stage_b import StageB
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.training.data.hints import MAKERS, Tools
from cascade_nodes.cascade_core.training.data.masks import (
    masks_around_things,
    random_masks,
    training_masks,
)
from cascade_nodes.cascade_core.training.gradient_checkpointing import (
    checkpoint_blocks,
    checkpoint_segments,
    segments_of,
)
from cascade_nodes.cascade_core.training.tasks import controlnet as control
from cascade_nodes.cascade_core.training.tasks import lora
from cascade_nodes.cascade_core.training.tasks.finetune import select_parameters
from cascade_nodes.cascade_core.training.tasks.lora import LoRATask
from cascade_nodes.cascade_core.training.tasks.low_rank import LowRankChanges, select_layers
from cascade_nodes.tests.core.training_runs import TASKS, loop_of, settings_of, write_world
from cascade_nodes.tests.golden_weights import relative_error
from cascade_nodes.tests.nodes.tiny import CONFIGS, shake


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def inputs_of(loop, rows=4):
    """A batch that no step trains on in this order."""
    return loop.task.prepare(loop.data.batch(1000, rows), torch.Generator().manual_seed(3))


def error_of(loop, inputs):
    """The error of the noise, averaged over times."""
    total = 0.0
    with torch.no_grad():
        for seed in range(8):
            torch.manual_seed(seed)
            total += loop.task.loss(inputs)["loss"].item() / 8
    return total


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_falls(world, tmp_path, name):
    learning = {"train": {"steps": 30, "ema": 0.0}, "objective": {"weighting": "constant"}}
    loop = loop_of(settings_of(world, name, tmp_path, **learning))
    inputs = inputs_of(loop)
    before = error_of(loop, inputs)
    loop.run()
    assert error_of(loop, inputs) < 0.99 * before


@pytest.fixture(scope="module")
def x():
    """Stage C's inputs: a noised latent with its conditions."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 16, 4, 3, generator=generator),
        "r": torch.rand(2, generator=generator),
        "clip_text": torch.randn(2, 5, 64, generator=generator),
        "clip_text_pooled": torch.randn(2, 1, 64, generator=generator),
        "clip_img": torch.zeros(2, 1, 48),
    }


def stage_c_of(settings) -> StageC:
    network = load_model(settings.models.stage_c, "stage_c", torch.float32)[0]
    assert isinstance(network, StageC)
    return network


@pytest.mark.parametrize("dialect", ["kohya", "official", "diffusers"])
def test_a_lora_file_gives_the_trained_network(world, tmp_path, x, dialect):
    settings = settings_of(world, "lora", tmp_path, lora={"dialect": dialect, "rank": 4, "alpha": 2.0})
    loop = loop_of(settings)
    loop.run()
    network = stage_c_of(settings)
    with torch.no_grad():
        plain = network(**x)
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    with loop.task.using(loop.state) as trained:
        wanted = trained(**x)
    adapter = read_adapter(path, network)
    assert len(adapter.stage_c) == len(select_layers(network, ["all"]))
    with patched(network, [Patch("out", adapter.stage_c)]), torch.no_grad():
        assert relative_error(network(**x), wanted) < 1e-5
    assert relative_error(plain, wanted) > 1e-2


def test_a_lora_file_in_halves(world, tmp_path):
    settings = settings_of(world, "lora with text", tmp_path, lora={"dtype": "fp16", "text_encoder": True})
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    adapter = read_adapter(path)
    for change in low_rank_changes({**adapter.stage_c, **adapter.text}).values():
        assert change.up.dtype == change.down.dtype == torch.float16


def test_a_lora_of_the_text_encoder_is_in_the_file(world, tmp_path):
    settings = settings_of(world, "lora with text", tmp_path)
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    encoder = TextEncoder.load(settings.models.text_encoder, torch.float32)
    plain = encoder.encode(["a red star"])
    with loop.task.using(loop.state):
        wanted = loop.task.prompts(["a red star"])
    with patched(encoder.model, [Patch("out", read_adapter(path).text)]):
        taught = encoder.encode(["a red star"])
    for given, want, before in zip(taught, wanted, plain, strict=True):
        assert relative_error(given, want) < 1e-5
        assert relative_error(before, want) > 1e-3


def test_learned_tokens_are_in_the_file(world, tmp_path):
    settings = settings_of(world, "tokens", tmp_path)
    loop = loop_of(settings)
    began = loop.task.trained.get_parameter("vectors").detach().clone()
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    tokens = read_adapter(path).tokens
    assert [(token.name, tuple(token.vectors.shape)) for token in tokens] == [("[blob]", (2, 64))]
    encoder = TextEncoder.load(settings.models.text_encoder, torch.float32)
    star = encoder.tokenizer.tokens("star")
    weight = encoder.model.text_model.embeddings.token_embedding.get_parameter("weight")
    assert torch.equal(began, torch.stack([weight[star[i % len(star)]] for i in range(2)]))
    assert not torch.equal(tokens[0].vectors, began)
    with loop.task.using(loop.state):
        wanted = loop.task.prompts(["a red [blob]"])
    for given, want in zip(encoder.encode(["a red [blob]"], tokens), wanted, strict=True):
        assert relative_error(given, want) < 1e-5


def test_a_lora_with_tokens_holds_both(world, tmp_path, x):
    settings = settings_of(world, "lora with tokens", tmp_path)
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    network, adapter = stage_c_of(settings), read_adapter(path)
    encoder = TextEncoder.load(settings.models.text_encoder, torch.float32)
    with loop.task.using(loop.state) as trained:
        wanted, text = trained(**x), loop.task.prompts(["a [blob]"])
    with patched(network, [Patch("out", adapter.stage_c)]), torch.no_grad():
        assert relative_error(network(**x), wanted) < 1e-5
    assert relative_error(encoder.encode(["a [blob]"], adapter.tokens).states, text[0]) < 1e-5


def test_a_token_beyond_the_first_chunk_is_learned(world, tmp_path):
    """Captions have two chunks, and only the second one holds the token."""
    settings = settings_of(world, "tokens", tmp_path / "run")
    (tmp_path / "long").mkdir()
    for number in range(2):
        shutil.copy(world / "pictures" / f"{number}.png", tmp_path / "long")
        (tmp_path / "long" / f"{number}.txt").write_text("a red star " * 40 + "on the [blob]")
    loop = loop_of(replace(settings, data=replace(settings.data, folder=str(tmp_path / "long"))))
    began = loop.task.trained.get_parameter("vectors").detach().clone()
    loop.run()
    assert (loop.task.trained.get_parameter("vectors") - began).abs().min() > 1e-4


def test_trainable_text_is_what_the_encoder_gives(world, tmp_path):
    """Captions of one and of two chunks together, as `TextEncoder.encode` joins and fills them up."""
    task = loop_of(settings_of(world, "tokens", tmp_path)).task
    encoder = TextEncoder.load(settings_of(world, "tokens", tmp_path).models.text_encoder, torch.float32)
    learned = task.trained.tokens(task.trained.get_parameter("vectors").detach())
    texts = ["a red [blob]", "a blue star " * 30 + "[blob]", "", "the small circle " * 60]
    with torch.no_grad():
        given = task.trainable_text.of(texts)
    for value, wanted in zip(given, encoder.encode(texts, learned), strict=True):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) < 1e-5


def test_what_a_dialect_cannot_say_is_said_before_the_run(world, tmp_path):
    with pytest.raises(CascadeError, match="1 learned tokens, which the dialect kohya has no keys for"):
        loop_of(settings_of(world, "lora with tokens", tmp_path, lora={"dialect": "kohya"}))
    with pytest.raises(CascadeError, match="There is no LoRA dialect 'kohia'"):
        loop_of(settings_of(world, "lora", tmp_path, lora={"dialect": "kohia"}))


def test_a_token_that_no_caption_has_is_refused(world, tmp_path):
    settings = settings_of(world, "tokens", tmp_path, tokens=[{"name": "cat"}])
    with pytest.raises(CascadeError, match=r"No caption holds \[cat\]"):
        loop_of(settings)


@pytest.mark.parametrize("name", ["controlnet", "controlnet from nothing"])
def test_a_controlnet_file_gives_the_trained_residuals(world, tmp_path, x, name):
    settings = settings_of(world, name, tmp_path, train={"steps": 12, "learning_rate": 3e-2})
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    network, _, config = load_model(path, "controlnet", torch.float32)
    assert config["proj_blocks"] == [0, 1, 2, 3]
    hint = torch.rand(2, KINDS[settings.controlnet.hint].channels, 128, 96)
    stage_c = stage_c_of(settings)
    with loop.task.using(loop.state) as trained:
        wanted = trained(**x, hint=hint)
    with torch.no_grad():
        assert relative_error(stage_c(**x, control=network(hint)), wanted) < 2e-3  # the file is in halves
        assert relative_error(stage_c(**x), wanted) > 1e-2


def test_a_controlnet_begins_with_the_compressors_backbone_and_no_effect(world, tmp_path):
    settings = settings_of(world, "controlnet", tmp_path)
    network = loop_of(settings).task.trained
    assert isinstance(network, ControlNet)
    compressor = load_model(settings.models.compressor, "compressor", torch.float32)[0]
    picture = torch.rand(1, 1, 64, 64)
    # its first convolution is unpadded where the channels are not three, as published: compare the weights
    own, given = (each.get_submodule("backbone").state_dict() for each in (network, compressor))
    assert torch.equal(own["0.0.weight"], given["0.0.weight"].sum(1, keepdim=True))
    assert all(torch.equal(own[name], given[name]) for name in given if name != "0.0.weight")
    assert network.backbone(picture).shape == (1, 32, 2, 2)
    assert all(residual is not None and residual.abs().max() == 0 for residual in network(picture))
    assert not network.training


def test_a_controlnet_file_is_gone_on_from(world, tmp_path):
    settings = settings_of(world, "controlnet", tmp_path)
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "first.safetensors"
    loop.task.write(loop.state, path, {})
    again = loop_of(settings_of(world, "controlnet", tmp_path / "second", controlnet={"start": str(path)}))
    first, second = loop.state, again.task.trained.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].half().float(), second[name].float()) for name in first)


def test_a_finetuned_file_gives_the_trained_network(world, tmp_path, x):
    settings = settings_of(
        world, "finetune of some", tmp_path, finetune={"modules": ["up_blocks.*"], "dtype": "fp32"}
    )
    loop = loop_of(settings)
    loop.run()
    path = tmp_path / "out.safetensors"
    loop.task.write(loop.state, path, {})
    network, before = load_model(path, "stage_c")[0], stage_c_of(settings)
    with loop.task.using(loop.state) as trained, torch.no_grad():
        assert torch.equal(network(**x), trained(**x))
    changed = {
        name
        for name, value in network.state_dict().items()
        if not torch.equal(value, before.get_parameter(name))
    }
    # sca and crp are never given, so that weights of theirs which only see zeros' embedding may stay
    assert {name.split(".")[0] for name in changed} == {"up_blocks"}
    assert len(changed) > 0.8 * len(select_parameters(network, ["up_blocks.*"]))


def tiny_stage_c() -> StageC:
    torch.manual_seed(0)
    network = StageC.from_config(CONFIGS["stage_c"])
    shake(network)
    return network.eval().requires_grad_(False)


def test_changes_are_added_inside_their_block_alone(x):
    network = tiny_stage_c()
    plain = network(**x)
    changes = LowRankChanges(select_layers(network, ["attention"]), rank=2)
    with changes.applied():
        assert torch.equal(network(**x), plain)  # up is zero
    torch.nn.init.normal_(changes.vector)
    assert torch.equal(network(**x), plain)
    with changes.applied():
        changed = network(**x)
        with changes.applied(torch.zeros_like(changes.vector)):
            assert torch.equal(network(**x), plain)
        assert torch.equal(network(**x), changed)
    assert relative_error(plain, changed) > 1e-2
    changes.remove()
    with changes.applied():
        pass
    assert torch.equal(network(**x), plain)


def test_layers_are_chosen_by_name():
    network = tiny_stage_c()
    everything = select_layers(network, ["all"])
    attention = select_layers(network, ["attention"])
    assert len(attention) == 4 * 4
    assert all(".attention.attn." in name for name in attention)
    assert {"embedding.1", "clf.1", "clip_txt_mapper", "up_upscalers.0.1.blocks.1"} <= everything.keys()
    assert not any("depthwise" in name for name in everything)
    queries = select_layers(network, ["down_blocks.*.to_q", "clf.1"])
    assert list(queries) == [
        "down_blocks.0.2.attention.attn.to_q",
        "down_blocks.1.2.attention.attn.to_q",
        "clf.1",
    ]
    with pytest.raises(CascadeError, match="'to_x' matches none of the"):
        select_layers(network, ["to_x"])


@pytest.mark.parametrize(
    ("name", "fsdp"),
    [(name, False) for name in ("lora", "lora for few steps", "controlnet", "finetune", "tokens")]
    + [("finetune", True), ("finetune of stage b", True)],
)
def test_blocks_computed_again_give_the_same_gradients(world, tmp_path, name, fsdp):
    gradients = []
    for recompute in (False, True):
        settings = settings_of(
            world, name, tmp_path, train={"gradient_checkpointing": recompute, "fsdp": fsdp}
        )
        loop = loop_of(settings)
        for parameter in loop.parameters:
            parameter.data += 0.01  # away from where half of the gradients are zero
        torch.manual_seed(5)
        loop.task.loss(inputs_of(loop))["loss"].backward()
        gradients.append([parameter.grad for parameter in loop.parameters])
    for kept, again in zip(*gradients, strict=True):
        assert (kept is None) == (again is None)
        if kept is not None:
            assert torch.equal(kept, again)


def test_blocks_computed_again_keep_only_their_input():
    network = tiny_stage_c()
    x = torch.randn(2, 16, 8, 8)
    conditions = torch.randn(2, 3, 64), torch.randn(2, 1, 64), torch.zeros(2, 1, 48)

    def kept() -> int:
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network(x.requires_grad_(), torch.rand(2), *conditions)
        return total

    before = kept()
    checkpoint_blocks(network)
    assert kept() < before / 5


def test_segments_of_repeated_levels_give_the_gradients_of_blocks():
    """Levels that run twice and dropout, for which each segment draws again what it has drawn."""
    config = {**CONFIGS["stage_b"], "block_repeat": [[2, 1], [3, 2]], "dropout": [0.1, 0.2]}
    gradients = []
    for checkpoint in (lambda network: None, checkpoint_blocks, checkpoint_segments):
        torch.manual_seed(0)
        network = StageB.from_config(config).train()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        checkpoint(network)
        torch.manual_seed(1)
        x = torch.randn(2, 4, 16, 16)
        predicted = network(x, torch.rand(2), torch.randn(2, 16, 4, 4), torch.randn(2, 1, config["c_clip"]))
        predicted.square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    whole, blocks, segments = gradients
    for expected, *others in zip(whole, blocks, segments, strict=True):
        assert all(torch.equal(expected, other) for other in others)


def test_a_cell_ends_before_a_resblock_and_where_training_does():
    level = StageC.from_config({**CONFIGS["stage_c"], "blocks": [[2, 1], [1, 1]]}).levels()[0][0]
    kinds = [[type(block).__name__[0] for block in segment] for segment in segments_of(level)]
    whole = ["".join(segment) for segment in kinds]
    assert whole == ["RTA", "RTA"]
    for block in level[:2]:
        block.requires_grad_(False)
    assert [len(segment) for segment in segments_of(level)] == [2, 1, 3]


def test_the_teacher_of_few_steps_is_the_untrained_network_guided(world, tmp_path, monkeypatch):
    settings = settings_of(
        world, "lora for few steps", tmp_path, objective={"guidance": [3.0], "cfg_rescale": 0.7}
    )
    loop = loop_of(settings)
    assert isinstance(loop.task, LoRATask)
    assert loop.task.changes is not None
    torch.nn.init.normal_(loop.task.changes.vector, std=0.3)
    inputs, network = inputs_of(loop, 2), stage_c_of(settings)
    states, pooled = loop.task.text_of(inputs)
    nothing, nothing_pooled = loop.task.text(torch.zeros(2, dtype=torch.long))
    image = torch.zeros(2, 1, 48)

    def check(predict, teacher, x0, *rest):
        x, r = torch.randn_like(x0), torch.rand(2)
        with torch.no_grad():
            cond = network(x, r, states, pooled[:, None], image)
            uncond = network(x, r, nothing, nothing_pooled[:, None], image)
            assert relative_error(teacher(x, r), guide(cond, uncond, 3.0, 0.7)) < 1e-4
            assert relative_error(predict(x, r), cond) > 1e-2  # the student has the changes
        return {"loss": x0.sum()}

    monkeypatch.setattr(lora, "consistency_loss", check)
    loop.task.loss(inputs)


def test_random_masks_repeat_and_cover_something():
    masks = random_masks(200, (32, 48), torch.Generator().manual_seed(1))
    assert torch.equal(masks, random_masks(200, (32, 48), torch.Generator().manual_seed(1)))
    assert masks.shape == (200, 32, 48)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    covered = masks.mean(dim=(1, 2))
    assert 0.2 < covered.mean() < 0.5
    assert (covered == 1).any()
    assert covered.min() > 0


def two_things():
    """Two red boxes on a background that goes from light to dark, (1, 3, 96, 192)."""
    image = torch.linspace(0.6, 0.5, 96)[None, None, :, None].repeat(1, 3, 1, 192)
    for left in (16, 128):
        image[:, :, 24:48, left : left + 32] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    return image


def test_masks_lie_around_one_thing_of_a_picture():
    images = two_things().repeat(60, 1, 1, 1)
    masks, found = masks_around_things(images, torch.Generator().manual_seed(1))
    assert found.all()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    left, right = masks[:, 24:48, 16:48], masks[:, 24:48, 128:160]
    whole = torch.stack([left.mean((1, 2)), right.mean((1, 2))], dim=1)  # how much of either is covered
    assert set(map(tuple, whole.tolist())) == {(1.0, 0.0), (0.0, 1.0)}
    sizes = masks.sum((1, 2))
    assert sizes.min() >= 24 * 32
    # Room of a tenth to each side, and the cells' own.
    assert sizes.max() <= (24 + 2 * 9.6 + 5) * (32 + 2 * 19.2 + 9)


def test_nothing_stands_out_of_an_even_picture_and_masks_are_anywhere():
    images = torch.full((40, 3, 64, 64), 0.5)
    _, found = masks_around_things(images, torch.Generator().manual_seed(1))
    assert not found.any()
    masks = training_masks(images, torch.Generator().manual_seed(1))
    assert torch.equal(masks, random_masks(40, (64, 64), torch.Generator().manual_seed(1)))


def test_half_of_the_masks_are_boxes_around_things():
    images = two_things().repeat(200, 1, 1, 1)
    masks = training_masks(images, torch.Generator().manual_seed(1))
    anywhere = random_masks(200, (96, 192), torch.Generator().manual_seed(1))
    others = (masks != anywhere).any(dim=(1, 2))
    assert 70 <= others.sum() <= 130
    assert masks[others].mean() < anywhere.mean()


def test_published_blocks_for_every_size():
    blocks = {}
    for name, sizes in {
        "3.6b": [[8, 24], [24, 8]],
        "1b": [[4, 12], [12, 4]],
        "tiny": [[1, 1], [1, 1]],
    }.items():
        with torch.device("meta"):
            stage_c = StageC.from_config({**CONFIGS["stage_c"], "blocks": sizes})
        blocks[name] = control.published_blocks(stage_c)
    assert blocks["3.6b"] == [0, 4, 8, 12, 51, 55, 59, 63]
    assert blocks["1b"] == [0, 2, 4, 6, 25, 27, 29, 31]
    assert blocks["tiny"] == [0, 1, 2, 3]


def test_the_identity_hint_maps_faces_where_they_are():
    """A map made by hand: one face in the left upper quarter, or everywhere; two faces where they are; none."""
    faces = torch.nn.functional.normalize(
        torch.randn(2, 512, generator=torch.Generator().manual_seed(0)), dim=1
    )
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0], [64.0, 64.0, 128.0, 128.0]])
    found = [(faces[:1], boxes[:1])] * 50 + [(faces, boxes), (faces[:0], boxes[:0])]
    images = torch.rand(len(found), 3, 128, 128)
    tools = Tools(find_faces=lambda given: found if given is images else [])
    maps = MAKERS["identity"](images, torch.Generator().manual_seed(1), tools)
    assert maps.shape == (52, 512, 4, 4)
    quarter = torch.zeros(512, 4, 4)
    quarter[:, :2, :2] = faces[0, :, None, None]
    everywhere = faces[0, :, None, None].expand(-1, 4, 4)
    kinds = [bool((each - everywhere).abs().max() < 1e-6) for each in maps[:50]]
    assert all(
        torch.allclose(each, everywhere if whole else quarter, atol=1e-6)
        for each, whole in zip(maps[:50], kinds, strict=True)
    )
    assert 5 < sum(kinds) < 25  # three in ten
    both = quarter.clone()
    both[:, 2:, 2:] = faces[1, :, None, None]
    assert torch.allclose(maps[50], both, atol=1e-6)
    assert maps[51].abs().max() == 0
