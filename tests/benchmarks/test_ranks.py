"""benchmarks/ranks.py: its measurements take their turns, and one that fails or hangs leaves the others alone."""

import json

import pytest

# In place of benchmarks/training.py: the LoRA breaks on the second of two GPUs, the ControlNet hangs on two.
TRAINING = """
import json, os, sys, time
value = dict(zip(sys.argv[1::2], sys.argv[2::2]))
task, rank = value["--tasks"], os.environ.get("RANK")
while not os.path.exists(value["--after"]):
    time.sleep(0.01)
print("on", os.environ["CUDA_VISIBLE_DEVICES"], "as", rank, flush=True)
if (task, rank) == ("lora", "1"):
    sys.exit("no kernel image is available")
if rank in (None, "0") and (task, rank) not in (("lora", "0"), ("controlnet", "0")):
    figures = {"steps_per_second": 2.0 if rank is None else 1.9, "peak_gb": 90.0 if rank is None else 45.0}
    with open(value["--json"] + ".part", "w") as file:
        json.dump({"results": {task: figures}}, file)
    os.replace(value["--json"] + ".part", value["--json"])
time.sleep(60)  # one that does not end is ended once its figures are there
"""


def test_a_task_is_one_row_with_its_usual_batch_or_that_batch_stated(module):
    row_name = module("ranks").row_name
    assert row_name("finetune") == row_name("finetune:16") == row_name("finetune:016") == "finetune:16"
    assert row_name("finetune:24") != row_name("finetune")


def test_a_measurement_that_fails_leaves_the_others_alone(module, tmp_path, monkeypatch, capsys):
    ranks, path = module("ranks"), tmp_path / "ranks.json"
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(ranks, "TRAINING", script)
    monkeypatch.setattr(
        "sys.argv",
        ["ranks.py", "--tasks", "finetune:24", "lora", "controlnet", "--limit", "3", "--json", str(path)],
    )
    with pytest.raises(SystemExit, match="Some of the measurements failed"):
        ranks.main()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["failed"] == {
        "lora:4, two": "ended with exit status 1",
        "controlnet:4, two": "took too long",
    }
    finetune, lora = written["rows"]["finetune:24"], written["rows"]["lora:4"]
    assert (finetune["batch"], finetune["times"], finetune["memory"], finetune["met"]) == (24, 1.9, 0.5, True)
    assert (lora["one"] is None, lora["two"] is None, "met" in lora) == (False, True, False)
    printed = capsys.readouterr().out
    assert "no kernel image is available" in printed
    assert [line.split("|")[-2].strip() for line in printed.splitlines()[-3:]] == [
        "met",
        *["not measured"] * 2,
    ]
