"""Settings that shapes do not determine are read from where they are stated; a message tells if nothing states them."""

import json
import logging
from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import (
    DIFFUSERS,
    NETWORKS,
    layout_named,
    load_model,
    write_safetensors,
)
from cascade_nodes.cascade_core.checkpoints.carried import CONFIG, as_tensor, carried_config
from cascade_nodes.cascade_core.stages.codec import load_stage_a
from cascade_nodes.cascade_core.stages.device import ComputeDevice
from cascade_nodes.cascade_core.stages.diffusion import SCALE_FACTOR, load_stage
from cascade_nodes.cascade_core.text.clip import load_clip
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.tests.nodes.tiny import CONFIGS, TRANSFORMER, shake

ODD = {
    "stage_c": {
        "nhead": [4, 8],
        "self_attn": [False, True],
        "switch_level": [True],
        "t_conds": ["crp", "sca"],
    },
    "stage_b": {"nhead": [-1, 16], "self_attn": False},
    "stage_a": {"scale_factor": 0.3764},
}
DIFFUSERS_CONFIGS = {  # as its config.json has them
    "stage_c": {
        "_class_name": "StableCascadeUNet",
        "num_attention_heads": [4, 8],
        "self_attn": [False, True],
        "switch_level": [True],
        "timestep_conditioning_type": ["crp", "sca"],
        "block_out_channels": [32, 32],
        "effnet_in_channels": None,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 1,
        "dropout": [0.1, 0.1],
    },
    "stage_b": {"num_attention_heads": [0, 16], "self_attn": False, "switch_level": None, "in_channels": 4},
    "stage_a": {"_class_name": "PaellaVQModel", "scale_factor": 0.3764, "up_down_scale_factor": 2},
}
FOLDERS = {"stage_c": "prior", "stage_b": "decoder", "stage_a": "vqgan"}


def network_of(kind: str) -> Any:
    torch.manual_seed(5)
    network = NETWORKS[kind].from_config({**CONFIGS[kind], **ODD[kind]}).eval().requires_grad_(False)
    shake(network)
    return network


@torch.no_grad()
def output_of(kind: str, network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    r = torch.tensor([0.4])
    if kind == "stage_c":
        extra = {"sca": torch.tensor([0.2]), "crp": torch.tensor([0.9])}
        return network(noise(1, 16, 8, 8), r, noise(1, 5, 64), noise(1, 1, 64), noise(1, 1, 48), **extra)
    if kind == "stage_b":
        return network(noise(1, 4, 16, 16), r, noise(1, 16, 3, 3), noise(1, 1, 64))
    return network.decode(noise(1, 4, 4, 4))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs are the same, but for rounding where mapped weights lie otherwise in memory."""
    return torch.allclose(a, b, atol=1e-5)


@pytest.fixture(params=ODD)
def kind(request) -> str:
    return request.param


def diffusers_folder(root, kind, config):
    """Weights in diffusers' names and folder, with that config.json."""
    network = network_of(kind)
    layout = layout_named(kind, DIFFUSERS)
    folder = root / FOLDERS[kind]
    file = folder / "diffusion_pytorch_model.safetensors"
    write_safetensors(file, layout.from_published(network.state_dict()), {})
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return network, file


def test_config_json_is_followed(kind, tmp_path):
    network, file = diffusers_folder(tmp_path, kind, DIFFUSERS_CONFIGS[kind])
    for path in (tmp_path, file.parent, file):
        loaded, _, _ = load_model(path, expect=kind)
        assert close(output_of(kind, loaded), output_of(kind, network))
    (file.parent / "config.json").unlink()
    guessed, _, _ = load_model(tmp_path, expect=kind)
    assert not close(output_of(kind, guessed), output_of(kind, network)), "the test would show it"


def test_a_file_of_another_name_is_not_the_folders(kind, tmp_path):
    _, file = diffusers_folder(tmp_path, kind, DIFFUSERS_CONFIGS[kind])
    file.rename(file.with_name("mine.safetensors"))
    _, _, config = load_model(file.with_name("mine.safetensors"), expect=kind)
    assert {name: config.get(name) for name in ODD[kind]} != ODD[kind]


REFUSED = [
    ({"num_attention_heads": [5, 5]}, r"nhead\[\d\] is 5, which does not divide"),
    ({"num_attention_heads": "many"}, "nhead is 'many', but a value such as"),
    ({"self_attn": [1, 0]}, r"self_attn is \[1, 0\], but a value"),
    ({"patch_size": 10**9}, "no Stage . can be built from the config"),
    ({"patch_size": 4}, "of another shape"),
    ({"in_channels": 8}, "of another shape"),
    ({"timestep_conditioning_type": ["abc"]}, "missing"),
    ("{", "config.json is not JSON with a table"),
    ("[1]", "config.json is not JSON with a table"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
@pytest.mark.parametrize("unet", ["stage_c", "stage_b"])
def test_what_config_json_cannot_say(unet, config, message, tmp_path):
    diffusers_folder(tmp_path, unet, config)
    with pytest.raises(CascadeError, match=message):
        load_model(tmp_path, expect=unet)


@pytest.mark.parametrize("scale", [0, -1, "half", float("nan"), True])
def test_a_scale_factor_is_a_number(scale, tmp_path):
    diffusers_folder(tmp_path, "stage_a", {"scale_factor": scale})
    with pytest.raises(CascadeError, match="scale_factor is"):
        load_model(tmp_path, expect="stage_a")
    diffusers_folder(tmp_path / "b", "stage_b", {"switch_level": [True]})
    with pytest.raises(CascadeError, match="StageBConfig does not know switch_level"):
        load_model(tmp_path / "b", expect="stage_b")


def test_pictures_of_another_scale_factor(tmp_path):
    """Latents outside are the published factor times what Stage B diffuses, whatever the file's own is."""
    network, _ = diffusers_folder(tmp_path, "stage_a", DIFFUSERS_CONFIGS["stage_a"])
    diffused = torch.randn(1, 4, 4, 4)
    codec = load_stage_a(tmp_path / "vqgan", ComputeDevice("cpu"))
    expected = network.decode(diffused).clamp(0, 1).movedim(1, -1)
    assert close(codec.decode(diffused * SCALE_FACTOR), expected)
    pictures = torch.rand(1, 16, 16, 3)
    expected = network.encode(pictures.movedim(-1, 1)) * SCALE_FACTOR
    assert close(codec.encode(pictures), expected)


@pytest.mark.parametrize("unet", ["stage_c", "stage_b"])
def test_heads_that_nothing_states_are_said(unet, tmp_path, caplog):
    network, said = network_of(unet), []
    write_safetensors(tmp_path / "x.safetensors", network.state_dict(), {})
    load_model(tmp_path / "x.safetensors", expect=unet, notify=said.append)
    assert said == [
        "x.safetensors does not say how many attention heads it has, and 32 is not a published width: heads of 64 are "
        "assumed, and with any others its pictures are wrong. Use a file that has its config in its metadata, or a "
        "folder with its config.json."
    ]
    device = ComputeDevice("cpu")
    with caplog.at_level(logging.WARNING):
        load_stage(unet, tmp_path / "x.safetensors", "fp32", device)
    assert said[0] in caplog.text
    config = json.dumps({**CONFIGS[unet], **ODD[unet]})
    write_safetensors(tmp_path / "y.safetensors", network.state_dict(), {"config": config})
    loaded, _, _ = load_model(tmp_path / "y.safetensors", expect=unet, notify=said.append)
    assert len(said) == 1
    assert close(output_of(unet, loaded), output_of(unet, network))


ENCODER = {**TRANSFORMER, "hidden_size": 64, "intermediate_size": 96, "projection_dim": 48}
ENCODERS = {
    "text": (build_text_model, {**ENCODER, "vocab_size": 99}),
    "vision": (build_vision_model, {**ENCODER, "image_size": 28, "patch_size": 14}),
}
INPUTS = {
    "text": {"input_ids": torch.tensor([[3, 5, 98]])},
    "vision": {"pixel_values": torch.ones(1, 3, 28, 28)},
}


@torch.no_grad()
@pytest.mark.parametrize("part", ENCODERS)
def test_transformers_config_json_is_followed(part, tmp_path):
    build, config = ENCODERS[part]
    odd = {**config, "num_attention_heads": 8, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 0.01}
    model = build(odd).eval()
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), {})
    said = []
    guessed = load_clip(tmp_path, part, build, notify=said.append)
    assert said[0].startswith(
        "model.safetensors does not say how many attention heads it has, and 64 is not a publ"
    )
    for stated in (odd, {"model_type": "clip", f"{part}_config": odd}):
        (tmp_path / "config.json").write_text(json.dumps(stated))
        loaded = load_clip(tmp_path, part, build, notify=said.append)
        assert close(loaded(**INPUTS[part])[0], model(**INPUTS[part])[0])
    assert not close(guessed(**INPUTS[part])[0], model(**INPUTS[part])[0])
    assert len(said) == 1
    for wrong, message in (
        ({"num_attention_heads": 7}, "does not divide"),
        (
            {"hidden_act": "swish"},
            "hidden_act is 'swish', expected one of quick_gelu, gelu, gelu_pytorch_tanh",
        ),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
        ({"num_hidden_layers": 99_999_999}, "blocks, but there are only"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**odd, **wrong}))
        with pytest.raises(CascadeError, match=message):
            load_clip(tmp_path, part, build)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_what_a_program_saves_as_tensors_states_a_config(tmp_path, kind, prefix, dtype):
    network = network_of(kind)
    carried = {name: tensor.to(dtype) for name, tensor in carried_config(network).items()}
    assert carried
    tensors = {prefix + name: tensor for name, tensor in {**network.state_dict(), **carried}.items()}
    path = tmp_path / "saved.safetensors"
    write_safetensors(path, tensors, {"prompt": "{}"})
    loaded, _, _ = load_model(path, expect=kind)
    assert loaded.config == network.config
    assert loaded.state_dict().keys() == network.state_dict().keys()


def test_what_the_tensors_tell_is_not_stated_again():
    with torch.device("meta"):
        for kind in NETWORKS:
            if kind != "controlnet":  # which ComfyUI does not save
                assert carried_config(NETWORKS[kind].from_config({})) == {}


def load_stating(tmp_path, text: bytes) -> Any:
    tensors = {
        **network_of("stage_b").state_dict(),
        CONFIG: torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
    write_safetensors(tmp_path / "strange.safetensors", tensors, {})
    return load_model(tmp_path / "strange.safetensors", expect="stage_b")[0]


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"nhead": [0, 0], "c_hidden": [32, 32]}'], ids=str)
def test_a_stated_config_of_strangers_is_refused(tmp_path, text):
    with pytest.raises(CascadeError):
        load_stating(tmp_path, text)


@pytest.mark.parametrize("text", [b"{}", b"[" * 100_000], ids=["nothing", "deep"])
def test_a_stated_config_that_is_none_costs_nothing(tmp_path, text):
    assert load_stating(tmp_path, text).config.c_hidden == tuple(CONFIGS["stage_b"]["c_hidden"])


def test_a_config_as_a_tensor_is_its_json():
    assert bytes(as_tensor({"nhead": [4]}).tolist()) == b'{"nhead": [4]}'
