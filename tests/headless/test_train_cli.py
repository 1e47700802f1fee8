"""`cascade train`: what is wrong in a settings file is named, and a run on the demo weights gives a file."""

import json
import os
import signal
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import read_adapter
from cascade_nodes.cascade_core.training.settings import (
    Settings,
    TaskName,
    read_settings,
    resolve,
    settings_from_json,
)
from cascade_nodes.cascade_core.training.typed_yaml import build, read_yaml
from cascade_nodes.demo.dataset import pictures
from cascade_nodes.demo.world import sample_scenes
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.train import finder
from cascade_nodes.tests.headless.command import errors_of, start

MINIMAL = "data: {folder: pictures}\ntrain: {steps: 3}\noutput: {file: style.safetensors}\n"
DEMO = """
models:
  stage_c: demo_stage_c.safetensors
  text_encoder: demo_text_encoder
  compressor: demo_compressor.safetensors
  previewer: demo_previewer.safetensors
data: {folder: pictures, size: 256}
train: {steps: 3, batch_size: 2, learning_rate: 1e-3}
output:
  file: made/style.safetensors
  log_every: 1
  sample_every: 3
  sample_steps: 2
  prompts: [a red star, a blue ring]
"""


def refusal(folder: Path, text: str, task: TaskName = "lora") -> str:
    (folder / "config.yaml").write_text(text)
    with pytest.raises(CascadeError) as error:
        read_settings(folder / "config.yaml", task)
    assert str(error.value).startswith(f"{folder / 'config.yaml'}")
    return str(error.value).removeprefix(f"{folder / 'config.yaml'}").removeprefix(": ")


def test_three_lines_are_a_whole_file(tmp_path):
    (tmp_path / "config.yaml").write_text(MINIMAL)
    settings = read_settings(tmp_path / "config.yaml", "lora")
    assert (settings.train.steps, settings.train.learning_rate) == (3, 1e-4)
    assert (settings.lora.rank, settings.objective.loss_weight) == (16, "p2")
    (tmp_path / "config.yaml").write_text(f"{MINIMAL}objective: {{kind: consistency}}\n")
    assert read_settings(tmp_path / "config.yaml", "lora").objective.loss_weight == "debiased"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("trian: {steps: 3}", "'trian' is not a setting; did you mean train?"),
        ("lora: {rnak: 8}", "lora: 'rnak' is not a setting; did you mean rank?"),
        (
            "optimiser: adamw",
            "'optimiser' is not a setting; known: data, output, models, train, validation, objective, lora, tokens, "
            "stage_b, preset.",
        ),
        ("lora: {ranks: {attention: 3.5}}", "lora.ranks.attention is 3.5, but a whole number is expected."),
        (
            "lora: {ranks: {attention: 0}}",
            "lora.ranks.attention is 0; it must be at least 1 and at most 16,384.",
        ),
        ("lora: {rates: {clf*: fast}}", "lora.rates.clf* is 'fast', but a number is expected."),
        ("lora: {rank: 8.5}", "lora.rank is 8.5, but a whole number is expected."),
        ("lora: {rank: true}", "lora.rank is True, but a whole number is expected."),
        ("lora: {rank: 0}", "lora.rank is 0; it must be at least 1 and at most 16,384."),
        ("lora: {rank: 1000000}", "lora.rank is 1000000; it must be at least 1 and at most 16,384."),
        ("lora: {alpha: 0}", "lora.alpha is 0.0; it must be at least 1e-06 and at most 1,000,000."),
        ("lora: {alpha: .nan}", "lora.alpha is nan; it must be at least 1e-06"),
        ("lora: {targets: []}", "lora.targets is empty, so nothing would be trained;"),
        (
            "objective: {max_loss_weight: -1}",
            "objective.max_loss_weight is -1.0; it must be above 0 and at most",
        ),
        (
            "objective: {guidance: [1, .inf]}",
            "objective.guidance is inf; it must be at least -1,000 and at most 1,000.",
        ),
        (
            "objective: {guidance: [1, 2, 3]}",
            "objective.guidance is [1.0, 2.0, 3.0]; one number or two bounds",
        ),
        ("tokens: [{name: '[]'}]", "tokens.name is '[]'; a token's name is a word or a few, such as [blob]"),
        ("tokens: [{name: a, vectors: 76}]", "tokens.vectors is 76; it must be at least 1 and at most 75."),
        ("lora: {targets: [1]}", "lora.targets[0] is 1, but a text is expected."),
        ("lora: 8", "lora is 8, but names with values are expected there."),
        ("objective: {weighting: adaptiv}", "objective.weighting is 'adaptiv'; did you mean adaptive?"),
        ("controlnet: {hint: canny}", "controlnet does not belong to `cascade train lora`; remove it."),
        ("task: lora", "'task' is not a setting; it is the command's: `cascade train lora`."),
        ("lora: {rank: 4}\nlora: {rank: 5}", ", line 5: lora is there twice."),
        (
            "lora: {rank: [}",
            " is not YAML: expected the node content, but found '}', in line 4, column 15; correct it.",
        ),
        ("lora: !!python/object/apply:os.system ['true']", " is not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, sentence):
    assert refusal(tmp_path, f"{MINIMAL}{change}\n").startswith(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("learning_rate: 1e400", "learning_rate is inf; it must be at least 1e-12 and at most 10."),
        ("learning_rate: 1e38", "learning_rate is 1e+38;"),
        ("clip_norm: -1", "max_grad_norm is -1.0; it must be at least 0 and at most 1,000,000,000,000."),
        ("max_grad_norm: .nan", "max_grad_norm is nan;"),
        ("weight_decay: -0.1", "weight_decay is -0.1;"),
        ("warmup: -1", "warmup is -1;"),
        ("betas: [0.9, 1]", "betas is 1.0; it must be at least 0 and below 1."),
        ("betas: [0.9]", "betas is [0.9]; two numbers are expected."),
        ("ema: 1", "ema is 1.0; it must be at least 0 and below 1."),
        ("seed: 9223372036854775808", "seed is 9223372036854775808;"),
        ("accumulate: 0", "accumulate is 0; it must be at least 1 and at most 65,536."),
    ],
)
def test_numbers_out_of_their_range(tmp_path, change, sentence):
    text = f"data: {{folder: x}}\noutput: {{file: x}}\ntrain: {{{change}}}\n"
    assert refusal(tmp_path, text).startswith(f"train.{sentence}")


def test_every_number_has_a_range():
    """Except numbers bounded by another setting."""
    numbers = {}
    for section in get_type_hints(Settings).values():
        for cls in (section, *get_args(section)):
            if is_dataclass(cls):
                for name, kind in get_type_hints(cls, include_extras=True).items():
                    plain = str(getattr(kind, "__origin__", kind))
                    if "int" in plain or "float" in plain:
                        numbers[name] = bool(getattr(kind, "__metadata__", ()))
    assert {name for name, ranged in numbers.items() if not ranged} == {"bucket_step", "sampling_steps"}
    assert len(numbers) > 30


def test_weights_of_the_error_in_x0_are_read_under_their_former_names(tmp_path, caplog):
    path = tmp_path / "config.yaml"
    path.write_text(f"{MINIMAL}objective: {{weighting: min_snr}}\n")
    settings = read_settings(path, "lora")
    assert settings.objective.loss_weight == "x0_min_snr"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: objective.weighting min_snr is now called x0_min_snr. The former names are still read."
    ]
    assert settings_from_json(settings.as_json().replace('"x0_min_snr"', '"min_snr"')) == settings


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BOMB, ", line 4: settings have at most 10,000 values."),
        ("train: [" + "1, " * 10_000 + "1]", ", line 1: settings have at most 10,000 values."),
        ("a: &a [*a]", ", line 1: an alias stands within what it stands for."),
        ("train: " + "[" * 3000, ", line 1: settings are not nested so deeply."),
        ("{a: " * 2000, ", line 1: settings are not nested so deeply."),
        ("? " * 2000, ", line 1: settings are not nested so deeply."),
        ("? [a]\n: b", ", line 1: ['a'] is not the name of a setting."),
        ("? 1.5\n: b", ", line 1: 1.5 is not the name of a setting."),
        ("null: 1", ", line 1: None is not the name of a setting."),
        (
            "train: {steps: 0100}",
            ", line 1: '0100' is not decimal to YAML; write it as a plain decimal number.",
        ),
        ("train: {steps: 1:30}", ", line 1: '1:30' is not decimal to YAML;"),
        ("train: {steps: " + "1" * 5000 + "}", " is not YAML: Exceeds the limit"),
        ("train: {steps: 2024-05-99}", " is not YAML: day is out of range for month"),
        ("train: {steps: !!bool maybe}", " is not YAML: a value does not fit its tag"),
        ("train: {steps: !!timestamp then}", " is not YAML: a value does not fit its tag"),
        ("train: {steps: \x00}", " is not YAML: unacceptable character #x0000"),
        ("a: 1\n--- \nb: 2", " is not YAML: expected a single document"),
        ("<<: {train: {}}", " is not YAML: could not determine a constructor"),
        ("!!map [1, 2]", " is not YAML: a value does not fit its tag"),
        ("? " + "x" * 300_000 + "\n: 1", "'xxxxxxxx"),
        (
            "#" + "x" * 1_000_000,
            " is larger than the 1,000,000 bytes that settings may have; give another file.",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_odd_yaml_is_one_sentence(tmp_path, text, sentence):
    told = refusal(tmp_path, text)
    assert told.startswith(sentence)
    assert len(told) < 700


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {steps: !!set {a}}", "train.steps is {'a'}, but a whole number is expected."),
        ("train: {steps: yes}", "train.steps is True, but a whole number is expected."),
        (
            "train: {steps: 18446744073709551617}",
            "train.steps is 18446744073709551617; it must be at least 1",
        ),
        (
            "train: {learning_rate: 2024-05-09}",
            "train.learning_rate is datetime.date(2024, 5, 9), but a number",
        ),
        (
            "train: {learning_rate: 1" + "0" * 400 + "}",
            "train.learning_rate is <a number of 1329 bits>, but a number",
        ),
        (
            r'models: {previewer: "a\0b"}',
            r"models.previewer is 'a\x00b', which holds the character '\x00'; leave",
        ),
        (
            r'models: {previewer: "a\ud800"}',
            r"models.previewer is 'a\ud800', which holds the character '\ud800';",
        ),
        (
            r'models: {previewer: "\e[2J"}',
            r"models.previewer is '\x1b[2J', which holds the character '\x1b';",
        ),
        (
            "controlnet: {config: text}",
            "controlnet.config is 'text', but names with values are expected there.",
        ),
        (
            "controlnet: {config: {a: [2024-05-09]}}",
            "controlnet.config.a[0] is datetime.date(2024, 5, 9), but a",
        ),
        ("controlnet: {config: {a: .nan}}", "controlnet.config.a is nan, but a plain number"),
    ],
    ids=lambda value: value[:40],
)
def test_odd_values_are_named(tmp_path, text, sentence):
    text = f"data: {{folder: x}}\noutput: {{file: x}}\n{text}\n"
    assert refusal(tmp_path, text, "controlnet").startswith(sentence)


def test_encodings_and_kinds_of_files(tmp_path):
    text = f"{MINIMAL}tokens: [{{name: 'café'}}]\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "config.yaml").write_text(text, encoding=encoding)
        assert read_settings(tmp_path / "config.yaml", "lora").tokens[0].name == "café"
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(
        CascadeError, match=r"is not YAML in UTF-8 \(invalid continuation byte at byte \d+\); save it"
    ):
        read_settings(tmp_path / "config.yaml", "lora")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, reason in (
        ("pipe.yaml", "it is a pipe or a device"),
        (".", "it is a folder"),
        ("a\0", "its name holds"),
    ):
        with pytest.raises(CascadeError, match=f"cannot be read \\({reason}"):
            read_settings(tmp_path / name, "lora")
    assert refusal(tmp_path, "") == "data is missing; it has no default."


def test_what_is_missing_is_named(tmp_path):
    assert refusal(tmp_path, "data: {folder: x}\n") == "output is missing; it has no default."
    assert (
        refusal(tmp_path, "data: {folder: x}\noutput: {}\n") == "output.file is missing; it has no default."
    )
    assert refusal(tmp_path, MINIMAL, "tokens").startswith("tokens is missing; name at least one")
    assert refusal(tmp_path, "- data\n").endswith("but settings are names with values, as `train: …`.")
    assert "neither a folder nor tars" in refusal(tmp_path, "data: {}\noutput: {file: x}\n")


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"{MINIMAL}objective: {{guidance: 3, pure_noise_share: 5e-2, max_loss_weight: 16}}\n"
        "lora: {targets: attention}\n"
    )
    settings = read_settings(tmp_path / "config.yaml", "lora")
    assert settings.objective.guidance == (3.0,)
    assert settings.objective.pure_noise_share == 0.05
    assert settings.objective.max_loss_weight == 16.0
    assert settings.lora.targets == ("attention",)


FORMER = (
    "data: {folder: x}\noutput: {file: x}\ntrain: {clip_norm: 0.5}\n"
    "objective: {largest_weight: 16, share_at_start: 0.1, own_path: 0.2}\n"
)
CURRENT = (
    "data: {folder: x}\noutput: {file: x}\ntrain: {max_grad_norm: 0.5}\n"
    "objective: {max_loss_weight: 16, pure_noise_share: 0.1, on_policy_share: 0.2}\n"
)


def test_former_names_are_read_with_one_line_of_notice(tmp_path, caplog):
    path = tmp_path / "config.yaml"
    path.write_text(CURRENT)
    current = read_settings(path, "lora")
    assert caplog.records == []
    path.write_text(FORMER)
    assert read_settings(path, "lora") == current
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{path}: train.clip_norm is now called train.max_grad_norm; "
        "objective.largest_weight is now called objective.max_loss_weight; "
        "objective.share_at_start is now called objective.pure_noise_share; "
        "objective.own_path is now called objective.on_policy_share. The former names are still read."
    )


def test_a_key_under_both_names_is_refused(tmp_path):
    sentence = refusal(tmp_path, f"{MINIMAL}objective: {{own_path: 0.1, on_policy_share: 0.1}}\n")
    assert sentence == (
        "objective holds both on_policy_share and own_path, which is its former name; remove own_path."
    )


def test_settings_that_a_state_was_written_with_are_known_under_their_former_names(tmp_path):
    (tmp_path / "config.yaml").write_text(CURRENT)
    settings = read_settings(tmp_path / "config.yaml", "lora")
    written = settings.as_json()
    assert settings_from_json(written) == settings
    former = {
        "max_grad_norm": "clip_norm",
        "max_loss_weight": "largest_weight",
        "pure_noise_share": "share_at_start",
        "on_policy_share": "own_path",
    }
    for name, before in former.items():
        assert f'"{name}"' in written
        written = written.replace(f'"{name}"', f'"{before}"')
    assert settings_from_json(written) == settings
    assert settings_from_json(written.replace('"own_path": 0.2', '"own_path": 0.3')) != settings
    assert settings_from_json(written.replace('"own_path"', '"their_path"')) is None
    assert settings_from_json("") is None


def test_paths_are_relative_to_the_file_and_networks_are_looked_up(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.safetensors").touch()
    path = folder / "config.yaml"
    path.write_text(
        f"{MINIMAL.replace('folder: pictures', 'folder: pictures, tars: [a/*.tar]')}"
        "models: {stage_c: mine.safetensors}\n"
    )
    found = finder(folder)
    assert found("text_encoder", "demo_text_encoder").is_dir()
    by_role = {"stage_c": found}
    settings = resolve(
        read_settings(path, "lora"),
        folder,
        lambda role, name: by_role[role](role, name) if role in by_role else Path(f"/{role}/{name}"),
    )
    assert settings.data.folder == str(folder / "pictures")
    assert settings.data.tars == (str(folder / "a/*.tar"),)
    assert settings.output.file == str(folder / "style.safetensors")
    assert settings.output.folder == str(folder / "runs" / "style")
    assert settings.models.stage_c == str(folder / "mine.safetensors")
    assert settings.models.compressor == "/compressor/effnet_encoder.safetensors"
    assert settings.models.previewer is None


@pytest.mark.parametrize("name", ["~nobody/x", "circle/x", "x" * 300, "x/" * 3000, "\t", "*?["])
@pytest.mark.parametrize("key", ["stage_c", "folder", "tars", "cache", "file", "run"])
def test_odd_places_are_one_sentence(world, capsys, key, name):
    """Odd paths are refused in a sentence, or are names like any other, and the error is about the dialect."""
    os.symlink("circle", "circle")
    text = {"folder": "pictures", "tars": [], "cache": None, "file": "out.safetensors", "run": "run"}
    text |= {"stage_c": "demo_stage_c.safetensors"}
    text[key] = [name] if key == "tars" else name + "/out.safetensors" * (key == "file")
    models = {"text_encoder": "demo_text_encoder", "compressor": "demo_compressor.safetensors"}
    settings = {
        "models": {**models, "stage_c": text["stage_c"]},
        "data": {part: text[part] for part in ("folder", "tars", "cache")},
        "output": {"file": text["file"], "folder": text["run"]},
        "lora": {"dialect": "none"},
    }
    Path("config.yaml").write_text(json.dumps(settings))
    assert main(["train", "lora", "config.yaml"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "please report" not in told
    assert told.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["train", "lora", str(tmp_path / "none.yaml")]) == 1
    path = tmp_path / "none.yaml"
    assert capsys.readouterr().err == (
        f"error: {path} cannot be read (No such file or directory); give a settings file in YAML.\n"
    )
    with pytest.raises(CascadeError, match="cannot be read"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("package", "sentence"),
    [
        ("accelerate", "Training runs on accelerate, which is not installed; run: pip install accelerate"),
        ("yaml", "Training settings are read by PyYAML, which is not installed; run: pip install PyYAML"),
        (
            "bitsandbytes",
            "train.optimizer adamw8bit is bitsandbytes', which is not installed; run: pip install",
        ),
    ],
)
def test_a_package_that_is_not_installed(world, capsys, monkeypatch, package, sentence):
    Path("config.yaml").write_text(DEMO.replace("steps: 3,", "steps: 3, optimizer: adamw8bit,"))
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "lora", "config.yaml"]) == 1
    assert f"error: {sentence}" in capsys.readouterr().err


def test_a_union_takes_what_any_of_its_members_takes():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Either:
        value: int | tuple[str, ...] | None = None

    assert [build(Either, {"value": value}).value for value in (3, ["a"], "a", None)] == [
        3,
        ("a",),
        ("a",),
        None,
    ]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Four pictures of the toy world, and the settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    drawn = pictures(sample_scenes(4, seed=0, split="train"), torch.device("cpu"), 64)
    for number, picture in enumerate(drawn):
        Image.fromarray(picture.movedim(0, -1).contiguous().numpy()).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text("a red star")
    Path("config.yaml").write_text(DEMO)
    return tmp_path


def test_three_steps_on_the_demo(world, capsys):
    (world / "pictures" / "of_a_phone.heic").write_bytes(b"")
    assert main(["train", "lora", "config.yaml"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoded 4/4"
    assert lines[1].startswith("4 pictures with 1 caption: 4 of 256 × 256")
    assert "; 1 is left out (left_out.txt lists all): of_a_phone.heic (pictures of kind .heic are" in lines[1]
    assert lines[2].startswith("Training on the processor in fp32, 1 process: ")
    assert [line.split("  ")[0] for line in lines[3:6]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert lines[-2].startswith(
        f"Wrote {world / 'made' / 'style.safetensors'}: a LoRA of rank 16 of 87 layers"
    )
    assert lines[-1] == "Try it: cascade run runs/style/try.json"
    assert main(lines[-1].split()[3:]) == 0  # the demo's own Stage B and A are found
    assert Image.open(world / "output" / "style_00001_.png").size == (256, 256)
    capsys.readouterr()
    adapter = read_adapter(world / "made" / "style.safetensors")
    assert adapter.dialect == "kohya"
    assert all(change.rank == 16 for change in adapter.stage_c.values())
    run = world / "runs" / "style"
    assert (run / "left_out.txt").read_text().startswith("of_a_phone.heic\t")
    assert Image.open(run / "samples" / "000003.png").size == (2 * 48 + 4, 48)
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "cache",
        "left_out.txt",
        "log.jsonl",
        "loss.png",
        "samples",
        "state.safetensors",
        "try.json",
    }

    assert main(["train", "lora", "config.yaml"]) == 0  # nothing is left to do
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The run is finished, at step 3,")


def test_a_signal_keeps_what_was_trained(world):
    text = DEMO.replace("steps: 3", "steps: 100000").replace("sample_every: 3", "sample_every: 0")
    Path("config.yaml").write_text(text)
    process = start("train", "lora", "config.yaml")
    errors = errors_of(process)
    for line in errors:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = errors.read().splitlines()
    assert process.wait() == 143
    assert rest[-1] == "Stopped; the same command goes on from here."
    assert (world / "runs" / "style" / "state.safetensors").is_file()
    assert not (world / "made").exists()
