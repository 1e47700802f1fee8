"""Bad values, files and folders in ComfyUI: the node says what is wrong, and the next prompt works.

Cases that need a single prompt are queued together, followed by one good prompt.
"""

import itertools
import json
import os

import numpy as np
import pytest
import torch

from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.errors import quoted
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.nodes.hosts import roles
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.graphs import DECODER, PRIOR, compress, demo, tiny
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.tiny import TRANSFORMER

SEEDS = itertools.count(1000)


def other_model(name):
    return node("OtherModel", name=name)


OTHER_MODELS = [
    (
        {"20": other_model("SDXL"), "7.model": ["20", 0]},
        PRIOR,
        "The MODEL connected to Cascade Prior Sampler is a SDXL model, but Stage C is expected; connect Load Stage "
        "C.",
    ),
    (
        {"20": other_model("SD 1.5"), "8.model": ["20", 0]},
        DECODER,
        "The MODEL connected to Cascade Decoder Sampler is a BaseModel model, but Stage B is expected; connect "
        "Load Stage B.",
    ),
    (
        {"20": other_model("none"), "7.model": ["20", 0]},
        PRIOR,
        "Cascade Prior Sampler got no MODEL; connect Load Stage C.",
    ),
    (
        {"7.model": ["2", 0]},
        PRIOR,
        "The MODEL connected to Cascade Prior Sampler is tiny_stage_b.safetensors (Stage B), but Stage C is "
        "expected; connect Load Stage C.",
    ),
    (
        {"8.model": ["1", 0]},
        DECODER,
        "The MODEL connected to Cascade Decoder Sampler is tiny_stage_c.safetensors (Stage C), but Stage B is "
        "expected; connect Load Stage B.",
    ),
    (
        {"20": node("CascadeGuidance", model=["21", 0], cfg_rescale=0.7, shift=2.0), "21": other_model("SDXL"),
         "7.model": ["20", 0]},
        "20",
        "The MODEL connected to Cascade Guidance is a SDXL model, but Stage B or C is expected; connect Load Stage "
        "C or Load Stage B.",
    ),
]  # fmt: skip
OTHER_WIDTHS = [
    (
        {"4.file": roles.DEMO_NAMES["text_encoder"]},
        PRIOR,
        "positive: text states of width 192 do not fit tiny_stage_c.safetensors (Stage C), which takes 64; load "
        "the text encoder that belongs to this model.",
    ),
    (
        {"20": node("OtherConditioning", width=768, pooled=768), "7.positive": ["20", 0]},
        PRIOR,
        "positive: text states of width 768 do not fit tiny_stage_c.safetensors (Stage C), which takes 64; load "
        "the text encoder that belongs to this model.",
    ),
    (
        {"20": node("OtherConditioning", width=64, pooled=1280), "7.negative": ["20", 0]},
        PRIOR,
        "negative: the pooled text vector of width 1280 do not fit tiny_stage_c.safetensors (Stage C), which takes "
        "64; load the text encoder that belongs to this model.",
    ),
    (
        {"20": node("OtherConditioning", width=64, pooled=1280), "8.positive": ["20", 0]},
        DECODER,
        "positive: the pooled text vector of width 1280 do not fit tiny_stage_b.safetensors (Stage B), which takes "
        "64; load the text encoder that belongs to this model.",
    ),
    (
        {"20": node("OtherConditioning", width=64, pooled=0), "7.positive": ["20", 0]},
        PRIOR,
        "positive has no pooled text vector, which tiny_stage_c.safetensors (Stage C) needs; connect Cascade Text "
        "Encode with the text encoder of this model.",
    ),
    (
        {"1.file": roles.DEMO_NAMES["stage_c"]},
        PRIOR,
        "positive: text states of width 64 do not fit demo_stage_c.safetensors (Stage C), which takes 192; load "
        "the text encoder that belongs to this model.",
    ),
]  # fmt: skip
OTHER_LATENTS = [
    (
        {"7.latent": ["6", 1]},
        PRIOR,
        "latent has the shape (1, 4, 16, 16), but tiny_stage_c.safetensors (Stage C) samples latents of 16 "
        "channels; connect the stage_c output of Cascade Empty Latent or Cascade Encode.",
    ),
    (
        {"8.latent": ["6", 0]},
        DECODER,
        "latent has the shape (1, 16, 2, 2), but tiny_stage_b.safetensors (Stage B) samples latents of 4 channels; "
        "connect the stage_b output of Cascade Empty Latent or Cascade Encode.",
    ),
    (
        {"20": node("OtherLatent", channels=8, side=2), "8.stage_c": ["20", 0]},
        DECODER,
        "stage_c of Cascade Decoder Sampler has the shape (1, 8, 2, 2), but Stage C's latent has 16 channels; "
        "connect Cascade Prior Sampler.",
    ),
    (
        {"9.samples": ["7", 0]},
        "9",
        "Cascade Decode got a latent of 16 channels, but Stage A decodes the 4 channels of Stage B's; connect "
        "Cascade Decoder Sampler, or the compressor to see Stage C's latent.",
    ),
    (
        {"6.width": 8},
        DECODER,
        "The picture is 8 × 64 pixels, but tiny_stage_b.safetensors (Stage B) makes none with a side under 16; "
        "choose a larger width and height.",
    ),
]
# ComfyUI lets values through where only a connection can be.
NOT_CONNECTED = [
    (
        {"7.model": 3},
        PRIOR,
        "The MODEL of Cascade Prior Sampler is 3, but a connection is expected; connect Load Stage C.",
    ),
    (
        {"7.positive": "x"},
        PRIOR,
        "positive holds 'x', but a CONDITIONING is expected; connect Cascade Text Encode.",
    ),
    ({"7.latent": {"samples": 1}}, PRIOR, "latent is 1, but a LATENT is expected; connect one."),
    (
        {"8.stage_c": {}},
        DECODER,
        "stage_c of Cascade Decoder Sampler is {}, but a LATENT is expected; connect one.",
    ),
    (
        {"9.vae": True},
        "9",
        "The VAE of Cascade Decode is True, but a connection is expected; connect Load Stage A VAE.",
    ),
    (
        {"5.clip": "x" * 10**5},
        "5",
        f"The CLIP of Cascade Text Encode is {quoted('x' * 10**5)}, but a connection is expected; connect Load "
        "Cascade Text Encoder.",
    ),
    (
        {
            "20": node("CascadeCanny", image={"a": 1}, low=100, high=200, size=224),
            "21": node("PreviewImage", images=["20", 0]),
        },
        "20",
        "image is {'a': 1}, but an IMAGE is expected; connect one.",
    ),
]
PROMPTS = [
    (
        {"5.positive": f"({word}:{weight})"},
        "5",
        f"The prompt gives ({word}:{weight}) the weight {shown}, which is not a finite number; write one such as "
        "(word:1.3), or \\( and \\) where brackets are meant.",
    )
    for word, weight, shown in (("a", "inf", "inf"), ("b", "nan", "nan"), ("c", "1e400", "inf"))
] + [
    (
        {"5.negative": "(" * 30_000 + "a" + ":1)" * 30_000},
        "5",
        "The prompt's brackets are nested too deeply; take some out, or write \\( and \\) where they are meant.",
    ),
    (
        {"5.negative": "a " * 10**6},
        "5",
        "negative has 2,000,000 characters; give at most 131,072.",
    ),
]
TOO_LARGE = [
    {"6.width": 16384, "6.height": 16384, "6.batch_size": 4096, **more}
    for more in ({}, {"6.compression": 4.0})
]
BAD = [changes for changes, *_ in (*OTHER_MODELS, *OTHER_WIDTHS, *OTHER_LATENTS, *NOT_CONNECTED, *PROMPTS)]
BAD += TOO_LARGE


def check_next(client, right_picture):
    """Asserts that the next prompt works."""
    good = tiny({"7.seed": next(SEEDS)})
    execution = client.run(good)
    assert execution.error is None
    (picture,) = client.pictures(execution)
    assert np.abs(picture.astype(int) - right_picture(good)).max() <= 1


def failure(execution):
    """(node, what it said)"""
    (error,) = execution.of("execution_error")
    assert error["exception_type"].endswith("CascadeError"), error["exception_message"]
    return error["node_id"], error["exception_message"].strip()


@pytest.fixture
def fails(client, right_picture):
    """Runs a graph that must fail; gives (node, what it said). Then the next prompt works."""

    def run(graph):
        execution = client.run(graph)
        check_next(client, right_picture)
        return failure(execution)

    return run


def key(changes):
    return json.dumps(changes, sort_keys=True)


@pytest.fixture(scope="session")
def executions(server, right_picture):
    """What came of the tiny graph with each of BAD, all queued at once. Then the next prompt works."""
    with Client(server) as client:
        prompts = {key(changes): client.queue(tiny(changes)) for changes in BAD}
        executions = {name: client.follow(prompt) for name, prompt in prompts.items()}
        check_next(client, right_picture)
    return executions


@pytest.mark.parametrize(("changes", "at", "said"), OTHER_MODELS)
def test_a_model_of_another_kind(executions, changes, at, said):
    assert failure(executions[key(changes)]) == (at, said)


@pytest.mark.parametrize(("changes", "at", "said"), OTHER_WIDTHS)
def test_widths_that_do_not_fit(executions, changes, at, said):
    assert failure(executions[key(changes)]) == (at, said)


def test_the_text_encoder_of_another_model(fails, server):
    """It is as wide as the published networks' encoder, before the demo's Stage C."""
    wide = {**TRANSFORMER, "hidden_size": 1280, "intermediate_size": 64, "projection_dim": 1280}
    wide |= {"num_attention_heads": 20, "vocab_size": 49408}
    folder = server.base / "models" / "text_encoders"
    write_safetensors(
        folder / "wide.safetensors", build_text_model(wide).half().state_dict(), {"config": json.dumps(wide)}
    )
    assert fails(demo({"4.file": "wide.safetensors"})) == (
        PRIOR,
        "positive: text states of width 1280 do not fit demo_stage_c.safetensors (Stage C), which takes 192; load "
        "the text encoder that belongs to this model.",
    )


@pytest.mark.parametrize(("changes", "at", "said"), OTHER_LATENTS)
def test_latents_that_do_not_fit(executions, changes, at, said):
    assert failure(executions[key(changes)]) == (at, said)


@pytest.mark.parametrize(("changes", "at", "said"), NOT_CONNECTED)
def test_a_value_in_place_of_a_connection(executions, changes, at, said):
    assert failure(executions[key(changes)]) == (at, said)


@pytest.mark.parametrize(("changes", "at", "said"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_that_cannot_be_read(executions, changes, at, said):
    assert failure(executions[key(changes)]) == (at, said)


def test_an_embedding_that_is_missing_is_told_and_left_out(client, right_picture):
    """The picture is the same as without ComfyUI."""
    graph = tiny({"5.positive": "a embedding:gone, (red:1.2) star", "7.seed": next(SEEDS)})
    execution = client.run(graph)
    assert execution.error is None
    (text,) = (text for at, text in execution.texts if at == "5")
    assert text.startswith("The prompt asks for embedding:gone, but no such file is in ")
    assert text.endswith("; its name is left out of the prompt.")
    (picture,) = client.pictures(execution)
    assert np.abs(picture.astype(int) - right_picture(graph)).max() <= 1


def test_a_vae_of_another_kind(fails):
    assert fails(compress({"12.vae": ["3", 0]})) == (
        "12",
        "The VAE connected to Cascade Encode is Stage A, but the semantic compressor is expected; connect Load "
        "Cascade Compressor.",
    )


@pytest.mark.parametrize("changes", TOO_LARGE)
def test_more_pictures_than_fit_into_memory(executions, changes):
    at, message = failure(executions[key(changes)])
    assert at == "6"
    assert message == (
        "4,096 pictures of 16,384 × 16,384 pixels would be made, but no side may exceed 16,384 pixels, nor all "
        "together 268,435,456; make fewer or smaller ones."
    )


@pytest.mark.parametrize("bad", ["truncated", "pickle", "empty", "another kind"])
def test_a_file_replaced_by_a_bad_one_while_it_is_loaded(client, fails, server, bad):
    """The bad file is put in place as a download does it; then the good one is put back."""
    client.run(tiny({"7.seed": next(SEEDS)}))
    file = server.base / "models" / "diffusion_models" / "tiny_stage_c.safetensors"
    backup, replacement = file.with_name("kept"), file.with_name("new")
    os.link(file, backup)
    if bad == "truncated":
        replacement.write_bytes(file.read_bytes()[:-100])
    elif bad == "pickle":
        torch.save({"weight": torch.zeros(3)}, replacement)
    elif bad == "empty":
        replacement.write_bytes(b"")
    else:
        replacement.write_bytes((server.base / "models" / "unet" / "tiny_stage_b.safetensors").read_bytes())
    os.replace(replacement, file)
    execution = client.run(tiny({"7.seed": next(SEEDS)}))
    os.replace(backup, file)
    (error,) = execution.of("execution_error")
    assert error["node_id"] == "1"
    assert error["exception_type"].endswith("CascadeError"), error["exception_message"]
    assert "tiny_stage_c.safetensors " in error["exception_message"]
    at, _ = fails(tiny({"7.model": ["2", 0]}))
    assert at == PRIOR


def test_model_folders_that_must_not_be_read(client, fails, server):
    """Their files are named as missing or closed, and the lists of all other loaders stay."""
    models = server.base / "models"
    closed = models / "stable_cascade"
    file = models / "diffusion_models" / "tiny_stage_c.safetensors"
    closed.chmod(0)
    file.chmod(0)
    try:
        status, answer = client.post("/prompt", {"prompt": compress(), "client_id": client.id})
        assert status == 200, "the other output can be made"
        for error in answer["node_errors"]["11"]["errors"]:  # one for each input that was looked at
            assert (
                "No semantic compressor file 'tiny_compressor.safetensors' was found in " in error["details"]
            )
            assert str(closed) in error["details"]
        client.follow(answer["prompt_id"])
        info = server.get("/object_info/StageBLoader")["StageBLoader"]
        assert "tiny_stage_b.safetensors" in info["input"]["required"]["file"][1]["options"]
        execution = client.run(tiny({"7.seed": next(SEEDS), "1.dtype": "fp32"}))
        (error,) = execution.of("execution_error")
        assert error["node_id"] == "1"
        assert "Permission denied" in error["exception_message"]
        assert error["exception_type"].endswith("CascadeError"), error["exception_message"]
    finally:
        closed.chmod(0o755)
        file.chmod(0o644)
    at, _ = fails(tiny({"7.model": ["2", 0]}))
    assert at == PRIOR
    assert client.run(compress()).error is None
