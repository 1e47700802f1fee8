"""Where files are found, offered and refused."""

import os
import shutil
from pathlib import Path

import pytest

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.nodes import files
from cascade_nodes.nodes.hosts import roles
from cascade_nodes.nodes.hosts.headless import find_file, list_files
from cascade_nodes.nodes.loaders import (
    CascadeCompressorLoader,
    CascadeTextEncoderLoader,
    StageAVAE,
    StageCLoader,
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder without models."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_demo(role):
    return [name for name in list_files(role) if name not in roles.demo_names(role)]


def test_files_are_listed_by_role(tiny, elsewhere):
    assert without_demo("stage_c") == [
        "tiny_compressor.safetensors",
        "tiny_stage_b.safetensors",
        "tiny_stage_c.safetensors",
    ]
    assert without_demo("text_encoder")[:2] == ["tiny_compressor.safetensors", "tiny_text_encoder"]
    assert without_demo("vision") == ["tiny_compressor.safetensors", "tiny_vision.safetensors"]
    assert without_demo("lora") == ["tiny_compressor.safetensors"]


def test_every_listed_name_is_found(tiny, elsewhere):
    for role in roles.FOLDERS:
        for name in list_files(role):
            assert find_file(role, name).exists()


def test_the_working_folder_and_several_roots(tiny, elsewhere, monkeypatch):
    second = elsewhere / "second"
    for folder in (second / "vae", elsewhere / "models" / "vae" / "inner"):
        folder.mkdir(parents=True)
        shutil.copy(tiny / "vae" / "tiny_stage_a.safetensors", folder / f"{folder.parts[-2]}.safetensors")
    monkeypatch.setenv("CASCADE_MODELS", f"{tiny}{os.pathsep}{second}")
    assert {"second.safetensors", "inner/vae.safetensors", "tiny_stage_a.safetensors"} <= set(
        list_files("stage_a")
    )
    assert find_file("stage_a", "inner/vae.safetensors") == elsewhere.joinpath(
        "models", "vae", "inner", "vae.safetensors"
    ).relative_to(elsewhere)


def test_a_path_is_its_own_name(tiny, elsewhere):
    path = tiny / "vae" / "tiny_stage_a.safetensors"
    assert find_file("stage_a", str(path)) == path
    shutil.copy(path, elsewhere / "mine.safetensors")
    assert find_file("stage_a", "mine.safetensors").name == "mine.safetensors"
    assert StageAVAE.validate_inputs(str(path)) is True


def test_what_is_not_there(tiny, elsewhere):
    with pytest.raises(
        CascadeError, match=r"No Stage C file 'nowhere.safetensors' was found under .*stable_cascade"
    ):
        find_file("stage_c", "nowhere.safetensors")
    assert "'nowhere.safetensors' was found" in str(StageCLoader.validate_inputs("nowhere.safetensors"))
    assert "No Stage C file is chosen" in str(StageCLoader.validate_inputs(""))
    assert StageCLoader.validate_inputs() is True  # a linked value is known only when it runs


def test_a_file_that_the_demo_no_longer_has(tiny, elsewhere):
    """A graph that names it is told what to do; a file of that name that somebody kept is still found."""
    name = "demo_lora_two_pictures.safetensors"
    assert not set(roles.RETIRED) & set(list_files("lora"))
    assert files.check("lora", name) == (
        f"The demo's Stage C takes two image prompts by itself, so {name} is no longer needed; take it out of the "
        "graph."
    )
    kept = elsewhere / "models" / "loras" / name
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert find_file("lora", name).name == name


def test_the_previewer_may_be_left_out(tiny, elsewhere):
    assert CascadeCompressorLoader.validate_inputs("tiny_compressor.safetensors", "none") is True
    message = CascadeCompressorLoader.validate_inputs("tiny_compressor.safetensors", "gone")
    assert "No previewer file" in str(message)


def test_a_changed_file_changes_the_fingerprint(tiny, elsewhere):
    path = elsewhere / "copy.safetensors"
    shutil.copy(tiny / "vae" / "tiny_stage_a.safetensors", path)
    before = StageAVAE.fingerprint_inputs(str(path))
    assert StageAVAE.fingerprint_inputs(str(path)) == before
    os.utime(path, ns=(1, 1))
    assert StageAVAE.fingerprint_inputs(str(path)) != before
    path.unlink()
    assert StageAVAE.fingerprint_inputs(str(path)).endswith("missing")
    folder = elsewhere / "encoder"
    shutil.copytree(tiny / "text_encoders" / "tiny_text_encoder", folder)
    before = CascadeTextEncoderLoader.fingerprint_inputs(str(folder))
    (folder / "vocab.json").write_text("{}")
    assert CascadeTextEncoderLoader.fingerprint_inputs(str(folder)) != before


@pytest.mark.parametrize("name", ["../secret.safetensors", "a/../../b", "/etc/passwd", ""])
def test_names_that_leave_their_folder(name):
    assert roles.leaves_folder(name)


def test_names_that_stay():
    assert not roles.leaves_folder("inner/file.safetensors")
    assert not roles.leaves_folder("a..b.safetensors")


def test_the_demo_may_have_several_of_a_kind(tmp_path, monkeypatch):
    for name in (
        "demo_lora_ink.safetensors",
        "demo_token_sun.safetensors",
        "demo_controlnet_canny.safetensors",
        "demo_controlnet_sr.safetensors",
    ):
        (tmp_path / name).touch()
    monkeypatch.setattr(roles, "DEMO_FOLDER", tmp_path)
    assert list_files("controlnet")[:2] == [
        "demo_controlnet_canny.safetensors",
        "demo_controlnet_sr.safetensors",
    ]
    assert list_files("lora")[:2] == ["demo_lora_ink.safetensors", "demo_token_sun.safetensors"]
    assert find_file("lora", "demo_lora_ink.safetensors") == tmp_path / "demo_lora_ink.safetensors"
    assert roles.demo_names("stage_c") == []  # not there


def test_a_name_with_the_separator_of_windows(tiny, elsewhere, monkeypatch):
    """Graphs that were saved on Windows have such names."""
    folder = elsewhere / "models" / "vae" / "sub"
    folder.mkdir(parents=True)
    shutil.copy(tiny / "vae" / "tiny_stage_a.safetensors", folder / "a.safetensors")
    assert find_file("stage_a", "sub\\a.safetensors") == Path("models/vae/sub/a.safetensors")
    assert find_file("stage_a", "models\\vae\\sub\\a.safetensors") == Path("models/vae/sub/a.safetensors")
    assert StageAVAE.validate_inputs("sub\\a.safetensors") is True


@pytest.mark.parametrize(
    "name", [".", "..", "/", "./", "//", "sub\\..", "\0", "\udce9", "x" * 5000, "/" * 5000, "\x1b[2J"]
)
def test_names_that_are_no_file(name, elsewhere):
    verdict = StageAVAE.validate_inputs(name)
    if name != "..":  # a folder, which its loader refuses
        assert isinstance(verdict, str)
        assert verdict.startswith("No Stage A file ")
        assert verdict.isprintable()
        assert len(verdict) < 600
    assert StageAVAE.fingerprint_inputs(name)


def test_the_fingerprint_of_a_folder_looks_at_a_bounded_number_of_files(elsewhere, monkeypatch):
    monkeypatch.setattr(files, "MOST_FILES", 10)
    for index in range(30):
        (elsewhere / f"{index:02}").write_bytes(b"")
    (elsewhere / "00").write_bytes(b"x")
    assert len(files.files_under(elsewhere)) == 10
