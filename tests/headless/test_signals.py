"""What asks the process to stop ends a command as Ctrl-C does: one line, an exit status, no temporary file."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from cascade_nodes.cascade_core import writing
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.headless import signals
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.core.lora_files import golden
from cascade_nodes.tests.headless.record_comfyui import node

GRAPH = {
    "1": node("LoadImage", image="in.png"),
    "2": node("SaveImage", images=["1", 0], filename_prefix="out"),
}
COMMANDS = {
    "run": ["run", "graph.json", "--output", "made"],
    "convert-lora": ["convert-lora", "in.safetensors", "made/out.safetensors", "--to", "kohya"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a graph and a LoRA, and an old picture in the folder for what is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "made").mkdir()
    Image.new("RGB", (8, 8)).save("in.png")
    Image.new("RGB", (8, 8)).save("made/out_00001_.png")
    write_safetensors("in.safetensors", golden("kohya"), {})
    return tmp_path


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """The handlers of a shell's foreground: in the background, or under `nohup`, these tests begin with others."""
    usual = {
        signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
    }  # fmt: skip
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_while_a_file_is_written(command, number, folder, monkeypatch, capsys):
    """It is sent twice, as `timeout` sends it; after the command the handlers are as before."""
    flush = writing.flush

    def signalled(path):
        flush(path)
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "flush", signalled)
        assert main(COMMANDS[command]) == 128 + number
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped."
    assert os.listdir("made") == ["out_00001_.png"]
    assert main(COMMANDS[command]) == 0
    assert len(os.listdir("made")) == 2


def test_a_repeated_signal_does_not_stop_the_cleaning_up(monkeypatch):
    def clean_up() -> None:
        with signals.stopping_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                cleaned.append(True)

    cleaned = []
    with pytest.raises(signals.Stopped):
        clean_up()
    assert cleaned == [True]
    monkeypatch.setattr(signals, "REPEATED", 0.0)  # it came so long afterwards that the cleaning up must hang
    with pytest.raises(signals.Stopped):
        clean_up()
    assert cleaned == [True]


def test_what_others_handle_is_left_alone():
    """Others are a program around us, `nohup`, and every thread but the first one, which cannot set handlers."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["fetch", "nothing"]).result() == 1
