"""Errors that can be known beforehand are reported first: no picture is encoded for a run that would fail."""

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import read_safetensors
from cascade_nodes.cascade_core.training.launch import build_accelerator
from cascade_nodes.cascade_core.training.run import train
from cascade_nodes.cascade_core.training.settings import Settings
from cascade_nodes.tests.core.training_runs import same, settings_of, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def refusal(settings: Settings, **options) -> str:
    """What is said, before any picture is encoded."""
    encoded = []
    with pytest.raises(CascadeError) as error:
        train(settings, caching=lambda *counts: encoded.append(counts), **options)
    assert encoded == []
    return str(error.value)


def writing_to(settings: Settings, file: object, **output) -> Settings:
    return replace(settings, output=replace(settings.output, file=str(file), **output))


def test_a_file_that_cannot_be_written(world, tmp_path):
    settings = settings_of(world, "lora", tmp_path / "run")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "a file").touch()
    for name in ("outdir", "", "/", "style.bin", ".safetensors"):
        sentence = refusal(writing_to(settings, tmp_path / name if name else name))
        assert "but a name that ends in .safetensors is expected, such as my_style.safetensors." in sentence
    for name in (
        "folder.safetensors",
        "a file/style.safetensors",
        f"{'x' * 300}.safetensors",
        "a\0.safetensors",
    ):
        assert refusal(writing_to(settings, tmp_path / name)).startswith("output.file: ")
    sentence = refusal(
        writing_to(settings, tmp_path / "style.safetensors", folder=str(tmp_path / "a file" / "run"))
    )
    assert sentence.startswith("output.folder: ")
    assert refusal(writing_to(settings, tmp_path / "run" / "state.safetensors")) == (
        f"output.file is {tmp_path / 'run' / 'state.safetensors'}, where the run keeps its state; give another name."
    )
    assert refusal(writing_to(settings, settings.models.stage_c)) == (
        f"output.file is {settings.models.stage_c}, which models.stage_c reads and which would be lost; "
        "give another name."
    )
    inside = Path(settings.models.text_encoder) / "model.safetensors"  # of a folder that is given as a whole
    assert "which models.text_encoder reads" in refusal(writing_to(settings, inside))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "sections", "sentence"),
    [
        (
            "lora",
            {"lora": {"dialect": "kohia"}},
            "There is no LoRA dialect 'kohia'; choose one of official, kohya",
        ),
        (
            "lora with tokens",
            {"lora": {"dialect": "kohya"}},
            "1 learned tokens, which the dialect kohya has no keys",
        ),
        (
            "lora with text",
            {"lora": {"dialect": "peft"}},
            "layers of the text encoder, which the dialect peft has no",
        ),
        (
            "lora",
            {"lora": {"rank": 5000}},
            "lora.rank is 5000, but no change of the 47 layers has a rank above ",
        ),
        (
            "lora",
            {"lora": {"ranks": {"attention": 5000}}},
            "lora.ranks.attention is 5000, but no change of the 47 layers has a rank above ",
        ),
        (
            "lora",
            {"lora": {"targets": ["nothing"]}},
            "lora.targets: 'nothing' matches none of the 47 layers of StageC",
        ),
        (
            "finetune",
            {"finetune": {"modules": ["nothing"]}},
            "finetune.modules: 'nothing' matches no module of StageC",
        ),
        ("tokens", {"tokens": [{"name": "cat"}]}, "No caption holds [cat], so nothing would be learned;"),
        (
            "tokens",
            {"tokens": [{"name": "blob"}, {"name": "[Blob]"}]},
            "tokens holds [Blob] twice; give each token a",
        ),
        (
            "controlnet",
            {"controlnet": {"config": {"c_proj": 3}}},
            "controlnet.config gives 3 channels, but this Stage C",
        ),
        ("controlnet", {"controlnet": {"config": {"stages": 5}}}, "controlnet.config: "),
        ("controlnet", {"controlnet": {"config": {"proj_blocks": "x"}}}, "controlnet.config: "),
        ("controlnet", {"controlnet": {"config": {"nothing": 1}}}, "controlnet.config: "),
        ("controlnet", {"controlnet": {"config": {"proj_blocks": [10**9]}}}, "controlnet.config: "),
        (
            "controlnet",
            {"controlnet": {"config": {"proj_blocks": [0, 4]}}},
            "controlnet.config has an output for block 4, but this Stage C has blocks 0 to 3; give a ControlNet for",
        ),
        (
            "controlnet",
            {"controlnet": {"config": {"c_proj": 12}}},
            "controlnet.config gives 12 channels, but this Stage C has ",
        ),
        ("lora", {"lora": {"rates": {"nothing": 2}}}, "lora.rates: 'nothing' matches none of the 47 layers"),
        (
            "controlnet",
            {"controlnet": {"hint": "super_resolution", "config": {"c_wide": 60_000, "c_hidden": 60_000}}},
            "controlnet.config makes a network of ",
        ),
        (
            "controlnet",
            {"controlnet": {"hint": "identity"}},
            "The identity hint needs something that finds faces;",
        ),
        (
            "lora",
            {"train": {"optimizer": "adamw8bit"}},
            "train.optimizer adamw8bit is bitsandbytes', which is not",
        ),
    ],
)
def test_settings_and_networks_that_do_not_go_together(
    world, tmp_path, monkeypatch, name, sections, sentence
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert sentence in refusal(settings_of(world, name, tmp_path, **sections))


def test_a_network_that_only_the_samples_need(world, tmp_path):
    settings = settings_of(world, "lora", tmp_path, output={"sample_every": 2, "prompts": ["a star"]})
    for file, sentence in (
        (settings.models.compressor, "previewer is expected here"),
        ("none", "none does not exist"),
    ):
        assert sentence in refusal(replace(settings, models=replace(settings.models, previewer=file)))
    with pytest.raises(CascadeError, match=r"makes pictures of output.prompts; give them, or leave it at 0"):
        settings_of(world, "lora", tmp_path, output={"sample_every": 2})
    with pytest.raises(CascadeError, match=r"output.prompts has 65 entries; at most 64"):
        settings_of(world, "lora", tmp_path, output={"prompts": ["a star"] * 65})


def test_missing_faces_are_found_out_on_an_empty_picture(world, tmp_path):
    def find_faces(images):
        raise CascadeError("InsightFace is not installed.")
        yield

    settings = settings_of(world, "controlnet", tmp_path, controlnet={"hint": "identity"})
    assert refusal(settings, find_faces=find_faces) == "InsightFace is not installed."


def test_more_prompts_than_a_bucket_has_pictures(world, tmp_path):
    output = {"sample_every": 1, "sample_steps": 1, "prompts": ["a star"] * 12}
    settings = settings_of(world, "controlnet", tmp_path, train={"steps": 1}, output=output)
    assert train(settings).finished
    assert (tmp_path / "samples" / "000001.png").is_file()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "USE_FSDP",
            "true",
            "accelerate is configured for FSDP (fsdp_config), which training here does not use;",
        ),
        ("USE_DEEPSPEED", "true", "accelerate is configured for DeepSpeed (deepspeed_config), which"),
        ("USE_MEGATRON_LM", "true", "accelerate is configured for Megatron-LM (megatron_lm_config), which"),
        ("USE_PARALLELISM_CONFIG", "true", "accelerate is configured for a parallelism_config, which"),
        (
            "DYNAMO_BACKEND",
            "INDUCTOR",
            "for dynamo_backend 'inductor', which training here does not use; set train",
        ),
        (
            "MIXED_PRECISION",
            "fp16",
            "for mixed_precision 'fp16', which training here does not use; this run computes ",
        ),
        ("MIXED_PRECISION", "fp8", "for mixed_precision 'fp8', which"),
        ("MIXED_PRECISION", "bf16", "computes in fp32: choose by train.precision in the settings file"),
    ],
)
def test_what_accelerate_is_configured_for_besides(world, tmp_path, monkeypatch, variable, value, sentence):
    """`accelerate launch` sets these variables; a run that ignored some would train something else."""
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert sentence in refusal(settings_of(world, "lora", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_process_that_would_train_alone_though_it_is_one_of_many_is_refused(monkeypatch):
    """srun starts such processes: it gives the rank under other names, and does not assign GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(CascadeError, match="WORLD_SIZE is '8', but nothing says which GPU is this"):
        build_accelerator()


@pytest.fixture
def fresh_accelerate():
    """accelerate without what earlier tests made of it, and without what this one leaves."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_processes_whose_port_is_taken_are_told_where(monkeypatch, fresh_accelerate):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        several = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in several.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(CascadeError, match=f"cannot meet at 127.0.0.1:{port} .*EADDRINUSE"):
            build_accelerator()


def test_processes_without_an_address_to_meet_at(monkeypatch, fresh_accelerate):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(CascadeError, match=r"cannot meet at \?:29500 .*MASTER_ADDR"):
        build_accelerator()


def test_what_accelerate_says_by_default_is_taken(world, tmp_path, monkeypatch):
    """So are settings without effect here: accelerate applies them only to objects passed to it, and none are."""
    weights = []
    for run, variables in {
        "plain": {},
        "default": {"USE_FSDP": "false", "DYNAMO_BACKEND": "NO", "MIXED_PRECISION": "no"},
        "agreeing": {"MIXED_PRECISION": "fp16", "GRADIENT_ACCUMULATION_STEPS": "3"},
    }.items():
        precision = "fp16" if run == "agreeing" else "fp32"
        settings = settings_of(world, "lora", tmp_path / run, train={"precision": precision, "steps": 2})
        with monkeypatch.context() as context:
            for variable, value in variables.items():
                context.setenv(f"ACCELERATE_{variable}", value)
            train(settings)
        weights.append(read_safetensors(tmp_path / run / "out.safetensors")[0])
    train(settings_of(world, "lora", tmp_path / "fp16", train={"precision": "fp16", "steps": 2}))
    assert same(weights[0], weights[1])
    assert same(weights[2], read_safetensors(tmp_path / "fp16" / "out.safetensors")[0])
