"""What is trained, and around which frozen weights."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cascade_nodes.cascade_core import CascadeError, StageC
from cascade_nodes.cascade_core.adapters import check_fits, describe_adapter, parse_adapter, read_adapter
from cascade_nodes.cascade_core.adapters.apply import Patch, patched
from cascade_nodes.cascade_core.checkpoints import load_model, read_safetensors, write_safetensors
from cascade_nodes.cascade_core.networks.quantisation import INT8, QuantisedLayer, quantise_network
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.training.checks import check_networks
from cascade_nodes.cascade_core.training.data.buckets import Bucket
from cascade_nodes.cascade_core.training.data.stage_b import published_sizes
from cascade_nodes.cascade_core.training.file_metadata import file_metadata
from cascade_nodes.cascade_core.training.frozen import NF4Linear, float_weight, quantise_to_nf4
from cascade_nodes.cascade_core.training.identity import differences
from cascade_nodes.cascade_core.training.losses import pyramid_noise
from cascade_nodes.cascade_core.training.run import load_trained_for
from cascade_nodes.cascade_core.training.settings import settings_of as read_values
from cascade_nodes.cascade_core.training.tasks.finetune import select_parameters
from cascade_nodes.cascade_core.training.tasks.low_rank import matrix_size
from cascade_nodes.tests.core.live_bytes import LiveBytes
from cascade_nodes.tests.core.training_runs import loop_of, settings_of, write_world
from cascade_nodes.tests.golden_weights import relative_error
from cascade_nodes.tests.nodes.tiny import CONFIGS

FORMER_SCALES = [0.5, 0.625, 0.75, 0.875, 1.0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def frozen_layer(base: str) -> nn.Linear:
    """A layer of a tiny Stage C, whose weight is held in `base`; the same each time."""
    torch.manual_seed(0)
    network = StageC.from_config(CONFIGS["stage_c"]).requires_grad_(False)
    if base == "int8":
        quantise_network(network, INT8)
    elif base == "nf4":
        quantise_to_nf4(network, torch.device("cpu"))
    layer = network.get_submodule("down_blocks.0.0.channelwise.0")
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize(("base", "error"), [("int8", 0.02), ("nf4", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_goes_through_the_dequantised_weight_and_no_copy_is_kept(base, error, dtype):
    layer, plain = frozen_layer(base), frozen_layer("full")
    x = torch.randn(3, layer.in_features, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        y = layer(x)
    gradient = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    weight = float_weight(layer).to(dtype)
    assert torch.equal(found, gradient @ weight)
    assert not kept
    assert 0 < relative_error(float_weight(layer), plain.weight.detach()) < error
    with torch.no_grad():
        assert torch.equal(
            layer(x), F.linear(x, weight, None if layer.bias is None else layer.bias.to(dtype))
        )
    assert matrix_size(layer) == tuple(plain.weight.shape)


def test_four_bits_are_a_quarter_of_sixteen():
    layer = frozen_layer("nf4")
    assert isinstance(layer, NF4Linear)
    assert layer.weight.nbytes * 4 == layer.in_features * layer.out_features * 2


def test_what_is_trained_itself_is_not_quantised(world, tmp_path):
    with pytest.raises(
        CascadeError, match="base_weights is int8, but finetune trains those weights themselves"
    ):
        settings_of(world, "finetune", tmp_path, train={"base_weights": "int8"})


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_the_text_encoder_is_trained_around_a_quantised_stage_c(world, tmp_path, base):
    """As the presets of small cards have it."""
    loop = loop_of(
        settings_of(world, "finetune of the text encoder", tmp_path, train={"base_weights": base, "steps": 1})
    )
    before = {name: value.clone() for name, value in loop.task.trained.state_dict().items()}
    loop.run()
    assert any(not torch.equal(before[n], value) for n, value in loop.task.trained.state_dict().items())
    layer = loop.task.network.get_submodule("down_blocks.0.0.channelwise.0")
    assert isinstance(layer, {"int8": QuantisedLayer, "nf4": NF4Linear}[base])


def test_nf4_without_its_package_is_told_before_anything_is_loaded(world, tmp_path, monkeypatch):
    settings = settings_of(world, "lora over nf4", tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CascadeError, match="pip install bitsandbytes, or choose int8"):
        check_networks(settings, [])


def trained(world, name, tmp_path, **sections):
    """A run of an entry of TASKS with its file written."""
    settings = settings_of(world, name, tmp_path, **sections)
    loop = loop_of(settings)
    loop.run()
    loop.task.write(loop.state, tmp_path / "out.safetensors", file_metadata(settings, loop.step, []))
    return settings, loop, tmp_path / "out.safetensors"


def stage_b_inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (1, 4, 16, 16), "effnet": (1, 16, 2, 2), "clip": (1, 1, 64)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "r": torch.tensor([0.5])}


@pytest.mark.parametrize(
    ("dialect", "key"), [("kohya", "lora_unet_clip_mapper"), ("comfyui", "diffusion_model.clip_mapper")]
)
def test_a_lora_of_stage_b_gives_the_trained_network(world, tmp_path, dialect, key):
    settings, loop, path = trained(
        world, "lora of stage b", tmp_path, lora={"network": "stage_b", "dialect": dialect}
    )
    assert f"{key}.lora_up.weight" in read_safetensors(path)[0]
    adapter = read_adapter(path)
    assert not adapter.stage_c
    assert "layers of Stage B, rank 16" in describe_adapter(adapter)
    assert adapter.metadata["modelspec.architecture"] == "stable-cascade-v1-stage-b/lora"
    network = load_model(str(settings.models.stage_b), "stage_b", torch.float32)[0]
    values = stage_b_inputs()
    with torch.no_grad():
        plain = network(**values)
    with loop.task.using(loop.state) as changed:
        wanted = changed(**values)
    with patched(network, [Patch("out", adapter.stage_b)]), torch.no_grad():
        assert relative_error(network(**values), wanted) < 1e-5
    assert relative_error(plain, wanted) > 1e-3


def test_stage_b_is_told_by_names_that_it_alone_has_and_else_by_the_metadata():
    def file(layer):
        return {f"lora_unet_{layer}.lora_down.weight": torch.zeros(1, 8),
                f"lora_unet_{layer}.lora_up.weight": torch.zeros(8, 1)}  # fmt: skip

    both = file("up_blocks_0_1_channelwise_0")
    assert parse_adapter(both, {}, "x").stage_c
    assert parse_adapter(both, {"modelspec.architecture": "stable-cascade-v1-stage-b/lora"}, "x").stage_b
    for alone in ("up_blocks_2_1_channelwise_0", "clip_mapper", "effnet_mapper_0"):
        assert len(parse_adapter({**both, **file(alone)}, {}, "x").stage_b) == 2, alone


def test_a_lora_of_the_other_stage_is_refused_by_name(world, tmp_path):
    _, _, path = trained(world, "lora of stage b", tmp_path)
    network = load_model(world / "models/diffusion_models/tiny_stage_c.safetensors", "stage_c")[0]
    with pytest.raises(CascadeError, match="is a LoRA of Stage B, but the network here is Stage C"):
        check_fits(read_adapter(path), network)


def test_dialects_without_names_for_stage_b_are_refused_before_the_work(world, tmp_path):
    settings = settings_of(
        world, "lora of stage b", tmp_path, lora={"network": "stage_b", "dialect": "official"}
    )
    with pytest.raises(
        CascadeError, match=r"layers of Stage B, which the dialect official has no keys for; .*kohya"
    ):
        check_networks(settings, [])


def test_a_lora_of_the_text_encoder_alone_holds_nothing_else(world, tmp_path):
    settings, loop, path = trained(world, "lora of the text encoder", tmp_path)
    adapter = read_adapter(path)
    assert not adapter.stage_c
    layers = {name.split(".")[0] for name in read_safetensors(path)[0]}
    others = {name for name in layers if not name.startswith("lora_te_text_model_encoder_layers_")}
    assert others == {"lora_prior_te_text_projection"}  # as ComfyUI reads it
    encoder = TextEncoder.load(settings.models.text_encoder, torch.float32)
    plain = encoder.encode(["a red star"]).states
    with loop.task.using(loop.state):
        wanted, _ = loop.task.prompts(["a red star"])
    with patched(encoder.model, [Patch("out", adapter.text)]):
        assert relative_error(encoder.encode(["a red star"]).states, wanted) < 1e-5
    assert relative_error(plain, wanted) > 1e-4


@pytest.mark.parametrize("name", ["finetune of the text encoder", "finetune with text"])
def test_a_text_encoder_that_was_trained_is_loaded_with_its_words(world, tmp_path, name):
    _, loop, path = trained(world, name, tmp_path, finetune={"dtype": "fp32"})
    with loop.task.using(loop.state) as network:
        wanted, _ = loop.task.prompts(["a red star"])
        stage = network(**stage_c_inputs())
    found = TextEncoder.load(path, torch.float32).encode(["a red star"]).states
    assert relative_error(found, wanted) < 1e-5
    if name == "finetune with text":  # one file, as ComfyUI's checkpoints are
        names = read_safetensors(path)[0]
        assert "model.diffusion_model.clip_txt_mapper.weight" in names
        assert "text_encoder.clip_g.transformer.text_model.final_layer_norm.weight" in names
        with torch.no_grad():
            written = load_model(path, "stage_c", torch.float32)[0](**stage_c_inputs())
        assert relative_error(written, stage) < 1e-5


def stage_c_inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "x": (1, 16, 4, 4),
        "clip_text": (1, 5, 64),
        "clip_text_pooled": (1, 1, 64),
        "clip_img": (1, 1, 48),
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "r": torch.tensor([0.5])}


def test_the_text_encoder_has_a_rate_of_its_own(world, tmp_path):
    loop = loop_of(settings_of(world, "finetune with text", tmp_path))
    assert [group["share"] for group in loop.optimiser.param_groups] == [1.0, 0.1]


def test_depth_chooses_blocks_in_the_order_of_a_forward_pass():
    network = StageC.from_config(CONFIGS["stage_c"])
    half = select_parameters(network, ["all"], (0.5, 1.0))
    assert {name.split(".")[0] for name in half} == {"up_blocks"}
    assert len(half) == sum(1 for name, _ in network.named_parameters() if name.startswith("up_blocks."))
    with pytest.raises(CascadeError, match=r"depth .* leaves none of the"):
        select_parameters(network, ["clf"], (0.5, 1.0))


def test_a_network_of_which_a_part_is_trained_is_never_whole_in_float32(world, tmp_path):
    """On a small card there is room in float32 for its trained part alone."""
    settings = settings_of(world, "finetune with text", tmp_path)
    weights, metadata = read_safetensors(settings.models.stage_c)
    halved = {name: value.bfloat16() for name, value in weights.items()}
    write_safetensors(tmp_path / "bf16.safetensors", halved, metadata)
    models = replace(settings.models, stage_c=str(tmp_path / "bf16.safetensors"))
    with LiveBytes() as live:
        network = load_trained_for(replace(settings, models=models), torch.bfloat16, torch.device("cpu"))
    parameters = dict(network.named_parameters())
    trained = select_parameters(network, ("all",), (0.5, 1.0))
    assert {name for name, value in parameters.items() if value.dtype == torch.float32} == trained
    whole, part = (sum(parameters[name].numel() for name in names) for names in (parameters, trained))
    assert 0.2 < part / whole < 0.8
    assert live.peak < (2 * whole + 4 * part) * 1.05  # the file's own pages, and the trained part


def test_stage_b_learns_from_the_compressor_at_several_sizes_and_without_it(world, tmp_path):
    loop = loop_of(
        settings_of(world, "lora of stage b", tmp_path, stage_b={"scales": [0.5, 1.0], "dropout": 0.5})
    )
    batches = [loop.data.batch(step, 3) for step in range(8)]
    drawn = [loop.task.prepare(each, torch.Generator().manual_seed(i)) for i, each in enumerate(batches)]
    for batch, inputs in zip(batches, drawn, strict=True):
        assert inputs.latents.shape[-1] >= 4 * batch.latents.shape[-1]
        assert inputs.latents.shape[1] == 4
    assert len({tuple(each.effnet.shape[-2:]) for each in drawn}) > 1
    empty = [bool((row == 0).all()) for each in drawn for row in each.effnet]
    assert 0 < sum(empty) < len(empty)


@pytest.mark.parametrize("bucket", [Bucket(1024, 1024), Bucket(640, 1600), Bucket(200, 328), Bucket(64, 64)])
def test_the_compressors_sizes_are_the_published_ones_and_as_often(bucket):
    """train_b.py's of a uniform factor, of which the compressor's stride leaves a few."""
    begins, sizes = published_sizes(bucket)
    factors = np.random.default_rng(0).uniform(0.5, 1, 20_000)
    published = Counter(tuple(int(((side * f) // 32) * 32) // 32 for side in bucket) for f in factors)
    shares = {size: 2 * (b - a) for size, a, b in zip(sizes, begins, [*begins[1:], 1.0], strict=True)}
    assert set(published) <= set(shares)
    for size, share in shares.items():
        assert published[size] / len(factors) == pytest.approx(share, abs=0.02)


def test_stage_b_draws_any_size_unless_some_are_named(world, tmp_path):
    loop = loop_of(settings_of(world, "lora of stage b", tmp_path))
    batches = [loop.data.batch(step, 3) for step in range(40)]
    found: dict[Bucket, set[tuple[int, ...]]] = {}
    for number, batch in enumerate(batches):
        _, effnet = loop.task.stage_b(batch, torch.Generator().manual_seed(number))
        bucket = loop.task.stage_b.buckets[batch.cache_keys[0]]
        found.setdefault(bucket, set()).add(tuple(effnet.shape[-2:]))
    assert found == {bucket: set(published_sizes(bucket)[1]) for bucket in found}
    assert sum(map(len, found.values())) > len(found) > 1


def test_a_state_from_before_any_size_could_be_drawn(world, tmp_path):
    """Stage B goes on with its five sizes put back; others, whose states named them too, just go on."""
    for name, going_on in (("lora", {}), ("lora of stage b", {"scales": FORMER_SCALES})):
        now = settings_of(world, name, tmp_path)
        values = json.loads(now.as_json())
        values["stage_b"]["scales"] = FORMER_SCALES
        metadata = {"settings": json.dumps(values)}
        assert differences(settings_of(world, name, tmp_path, stage_b=going_on), {}, metadata) == []
        differing = differences(now, {}, metadata)
        assert [each.partition(" ")[0] for each in differing] == ["stage_b.scales"] * len(going_on)


def test_pyramid_noise_is_the_published_one():
    """It equals train_b.py's `_pyramid_noise` for the same random numbers."""
    x0 = torch.zeros(2, 4, 40, 24)
    torch.manual_seed(3)
    found = pyramid_noise(x0)
    torch.manual_seed(3)
    epsilon, multipliers = torch.randn_like(x0), [1.0]
    for i in range(1, 10):
        m, h = 0.75**i, 40 // 2**i
        if 1 <= h <= 16:
            epsilon = epsilon + F.interpolate(torch.randn(2, 4, h, h), size=(40, 24), mode="nearest") * m
            multipliers.append(m)
        if h <= 1:
            break
    assert torch.equal(found, epsilon / sum(m**2 for m in multipliers) ** 0.5)


def test_samples_of_stage_b_are_pictures_of_the_prompts(world, tmp_path):
    output = {"sample_every": 8, "prompts": ["a red star"], "sample_steps": 2}
    loop = loop_of(settings_of(world, "lora of stage b", tmp_path, output=output, data={"size": 64}))
    loop.run()
    first, last = (tmp_path / "samples" / f"{step:06}.png" for step in (0, 8))
    with Image.open(first) as before, Image.open(last) as after:
        assert before.size == after.size == (64, 64)
        assert before.tobytes() != after.tobytes()


@pytest.mark.parametrize(
    ("name", "sections", "words"),
    [
        ("lora", {"lora": {"network": "text_encoder", "text_encoder": True}}, "leave one of them out"),
        ("lora", {"lora": {"network": "stage_b"}, "tokens": [{"name": "blob"}]}, "neither tokens nor image prompts"),
        ("finetune", {"finetune": {"depth": [0.7, 0.2]}}, "two shares of the network's blocks"),
        ("finetune", {"finetune": {"network": "text_encoder", "depth": [0, 0.5]}}, "for the text encoder give modules"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(world, tmp_path, name, sections, words):
    with pytest.raises(CascadeError, match=words):
        settings_of(world, name, tmp_path, **sections)


def test_the_section_of_stage_b_is_for_stage_b():
    values = {"data": {"folder": "."}, "output": {"file": "x"}, "stage_b": {}}
    with pytest.raises(CascadeError, match=re.escape("it is for `lora: {network: stage_b}`")):
        read_values(values, "lora", "x.yaml")
    read_values({**values, "lora": {"network": "stage_b"}}, "lora", "x.yaml")
