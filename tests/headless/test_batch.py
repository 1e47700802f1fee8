"""`cascade batch` in one process: rows, names, what is done again, contact sheets, shards and Ctrl-C."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from cascade_nodes.headless import run_graph
from cascade_nodes.headless.batch import rows
from cascade_nodes.headless.batch.journal import Journal
from cascade_nodes.headless.batch.plan import make_plan
from cascade_nodes.headless.batch.progress import BatchProgress
from cascade_nodes.headless.batch.work import GraphWorker, Job, Waiting
from cascade_nodes.headless.cli import main
from cascade_nodes.headless.results import Observer
from cascade_nodes.tests.headless.command import errors_of, start
from cascade_nodes.tests.headless.record_comfyui import node

GRAPH = {
    "1": node("EmptyImage", "Paper", width=8, height=8, batch_size=1, color=0),
    "2": node("SaveImage", images=["1", 0], filename_prefix="graph"),
}
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a graph; no launcher's variables around it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    return tmp_path


def table(*rows):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def batch(*more):
    return main(["batch", "graph.json", "rows.jsonl", "--output", "made", *more])


def colours(folder="made"):
    """{name of a picture: colour of its first pixel}"""
    root = Path(folder)
    return {
        path.relative_to(root).as_posix(): Image.open(path).convert("RGB").getpixel((0, 0))
        for path in sorted(root.rglob("*.png"))
    }


def lines(name="batch.jsonl"):
    return [json.loads(line) for line in (Path("made") / name).read_text().splitlines()]


def test_rows_set_inputs_and_name_their_pictures(folder, capsys):
    table(
        {"name": "red", "EmptyImage.color": 0xFF0000},
        {"name": "plants/green", "Paper.color": 0x00FF00, "1.batch_size": 2},
        {"1.color": "255"},
    )
    assert batch() == 0
    assert colours() == {
        "00003.png": BLUE,
        "plants/green_1.png": GREEN,
        "plants/green_2.png": GREEN,
        "red.png": RED,
    }
    printed = capsys.readouterr()
    paths = ["red.png", "plants/green_1.png", "plants/green_2.png", "00003.png"]
    assert printed.out.splitlines() == [str(Path("made") / path) for path in paths]
    assert printed.err.splitlines()[-1] == "3 of 3 rows made."


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_of_any_spreadsheet(separator, folder):
    """An empty cell stays as the graph has it."""
    cells = [["name", "1.color", "1.width"], ["a", "255", "16"], ["b", "", "24"]]
    text = "\r\n".join(separator.join(row) for row in cells)
    Path("rows.csv").write_text(text, encoding="utf-8-sig")
    assert main(["batch", "graph.json", "rows.csv", "--output", "made", "--set", "1.color=65280"]) == 0
    assert colours() == {"a.png": BLUE, "b.png": GREEN}
    assert [Image.open(f"made/{name}.png").width for name in "ab"] == [16, 24]


def test_a_csv_as_spreadsheets_leave_it(folder):
    """Empty lines, lines and columns of empty cells."""
    Path("rows.csv").write_text(",,,\r\n\r\nname,1.color,,\r\na,255,,\r\n,,,\r\n  \r\nb,,,\r\n,65280,,\r\n")
    assert main(["batch", "graph.json", "rows.csv", "--output", "made"]) == 0
    assert colours() == {"00003.png": GREEN, "a.png": BLUE, "b.png": (0, 0, 0)}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b'\n1.color,name\n1,a\n2,"b\n3,c\n',  # read on, all that follows would be one name
            "rows.csv cannot be read beyond line 3 (unexpected end of data); put a text with quotation marks or line "
            "breaks in quotation marks, and double those inside it.",
        ),
        (
            b'name\n"a" star\n',
            "rows.csv cannot be read beyond line 1 (',' expected after '\"'); put a text with",
        ),
        (
            "name\näpfel\n".encode("latin-1"),
            "rows.csv is not text in UTF-8; save it as such, which spreadsheets call CSV UTF-8.",
        ),
    ],
)
def test_a_csv_that_would_be_misread(content, sentence, folder, capsys):
    Path("rows.csv").write_bytes(content)
    assert main(["batch", "graph.json", "rows.csv", "--output", "made"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not Path("made").exists()


def test_parquet(folder, capsys):
    """In Parquet whole numbers beside missing ones become fractions; a value that JSON does not have fails its row."""
    columns = {"name": ["a", "b"], "1.color": [255.0, None], "1.width": [16, 24]}
    parquet.write_table(pyarrow.table(columns), "rows.parquet")
    assert main(["batch", "graph.json", "rows.parquet", "--output", "made"]) == 0
    assert colours() == {"a.png": BLUE, "b.png": (0, 0, 0)}
    parquet.write_table(pyarrow.table({"1.width": [b"16"]}), "bytes.parquet")
    assert main(["batch", "graph.json", "bytes.parquet", "--output", "made"]) == 1
    assert "holds b'16', which is not a value that JSON has." in capsys.readouterr().err
    for content in (b"", b"PAR1", Path("rows.parquet").read_bytes()[:-20]):
        Path("rows.parquet").write_bytes(content)
        assert main(["batch", "graph.json", "rows.parquet", "--output", "made"]) == 1
        assert "error: rows.parquet cannot be read as a table: " in capsys.readouterr().err


def test_a_picture_is_the_one_that_a_run_makes(folder):
    table({"name": "one", "1.color": 0xFF0000})
    assert batch() == 0
    run_graph("graph.json", assignments=["1.color=16711680", "2.filename_prefix=one"], output_folder="run")
    assert Path("made/one.png").read_bytes() == Path("run/one_00001_.png").read_bytes()


def test_a_row_that_cannot_be_done_stops_nothing(folder, capsys):
    Path("rows.jsonl").write_text(
        """
        {"name": "first", "1.color": 255}
        {"name": "first", "1.color": 1}
        a star
        {"name": "low", "1.width": -3}
        {"name": "words", "1.width": "wide"}
        {"name": "../out"}
        {"name": "100%"}
        {"name": "gone", "Sampler.seed": 1}
        {"name": "what", "prompt": "a star"}
        {"name": "e\\u0301"}
        {"name": "é", "1.color": 1}
        {"name": "both", "1.color": 1, "Paper.color": 2}
        {"name": "file", "2.filename_prefix": "stars"}
        {"name": "first.png/on", "1.color": 255}
        {"name": "last", "1.color": 255}
        """
    )
    assert batch() == 1
    assert list(colours()) == ["e\u0301.png", "first.png", "last.png"]
    said = capsys.readouterr().err
    for sentence in (
        "first: row 2 has the name of an earlier one; give each a name of its own.",
        "00003: line 4 of rows.jsonl is not JSON (",
        "low: Node 1 (EmptyImage): input 'width' is -3, but it must be between 1 and 16384.",
        "words: Node 1 (EmptyImage): input 'width' is 'wide', but it takes a whole number (INT).",
        "00006: the name '../out' leads out of the folder; give it another.",
        "00007: the name '100%' holds %, which begins a pattern in names of pictures; give it another.",
        "gone: The graph has no node 'Sampler' (id, class or title); its nodes: 1 (EmptyImage), 2 (SaveImage).",
        "what: 'prompt' is not NODE.INPUT, such as 3.steps, nor seed or name.",
        "é: row 11 has the name of an earlier one; give each a name of its own.",
        "both: '1.color' and 'Paper.color' are one input, 'color' of node 1 (EmptyImage); give one of them.",
        "file: filename_prefix of node 2 (SaveImage) has no effect in a batch, whose pictures are named by the rows; "
        "leave it out, and give names in the column name.",
        "first.png/on: made/first.png is a file, so no picture can be saved in it; give the row another name.",
    ):
        assert f"error: {sentence}" in said
    assert "3 of 15 rows made, 12 could not be made." in said
    assert [line["name"] for line in lines() if "error" in line].count("low") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["rows.txt"],
            "rows.txt does not have the name of a table; give a .jsonl, a .csv or a .parquet file.",
        ),
        (["no.csv"], "Cannot read the table no.csv: No such file or directory."),
        (["prompt.csv"], "The column 'prompt' of prompt.csv is not NODE.INPUT, name or seed."),
        (
            ["list.jsonl"],
            "list.jsonl is a JSON list; write each row's object in a line of its own, without [ and ].",
        ),
        (["--grid", "seed="], "--grid 'seed=' has no values; write a,b,c after \"=\"."),
        (["twice.csv"], "twice.csv has two columns of one name; its columns: seed, seed."),
        ([], "There are no rows; give a table (.jsonl, .csv or .parquet) or --grid NODE.INPUT=a,b,c."),
        (["--grid", "cfg=1,2"], "--grid 'cfg=1,2' is not NODE.INPUT=a,b,c, such as 3.cfg=2,4,6."),
        (["--grid", "1.color=1,1"], "--grid '1.color=1,1' names a value twice."),
        (
            ["--grid", "1.color=1", "1.color=2"],
            "--grid names one input twice; give all its values in one list.",
        ),
    ],
)
def test_what_is_wrong_with_the_whole_is_said_before_the_work(arguments, sentence, folder, capsys):
    Path("prompt.csv").write_text("prompt\na star\n")
    Path("twice.csv").write_text("seed,seed\n1,2\n")
    Path("list.jsonl").write_text('[{"1.color": 1},\n{"1.color": 2}]\n')
    assert main(["batch", "graph.json", *arguments, "--output", "made"]) == 1
    assert capsys.readouterr().err.splitlines() == [f"error: {sentence}"]
    assert not Path("made").exists() or os.listdir("made") == []


def test_what_is_wrong_with_every_row_is_said_once(folder, capsys):
    table({"1.colour": 1}, {"1.colour": 2})
    assert batch() == 1
    said = "Node 1 (EmptyImage) has no input 'colour'; its inputs: width, height, batch_size, color."
    assert capsys.readouterr().err.splitlines() == [f"error: {said}"]
    assert not lines()


def test_graphs_of_rows_that_wait_are_not_kept(folder):
    graph, journal = json.loads(Path("graph.json").read_text()), Journal(Path("made"))
    given = [rows.Row(name, {"1.color": number}) for number, name in enumerate("abc")]
    planned = make_plan(graph, given, [], lambda kind: None, journal).waiting
    journal.close()
    assert [row.name for row in planned] == ["a", "b", "c"]
    assert all(isinstance(each, Waiting) for each in planned)
    jobs = [row.job() for row in planned]
    assert [job.graph["1"]["inputs"]["color"] for job in jobs] == [0, 1, 2]
    assert planned[0].job() == jobs[0]
    assert planned[0].job().graph is not jobs[0].graph


def test_a_graph_that_saves_nothing(folder, capsys):
    Path("graph.json").write_text(json.dumps({"1": GRAPH["1"], "2": node("PreviewImage", images=["1", 0])}))
    table({"1.color": 1})
    assert batch() == 1
    assert "The graph has no node that saves pictures" in capsys.readouterr().err


def test_two_nodes_that_save(folder):
    three = node("SaveImage", images=["1", 0], filename_prefix="more")
    Path("graph.json").write_text(json.dumps(GRAPH | {"3": three}))
    table({"name": "a", "1.batch_size": 2})
    assert batch() == 0
    assert list(colours()) == ["a_1_1.png", "a_1_2.png", "a_2_1.png", "a_2_2.png"]


def test_the_same_command_makes_what_is_missing(folder, capsys):
    table({"name": "a", "1.color": 1}, {"name": "b", "1.batch_size": 2}, {"name": "c", "1.width": 0})
    assert batch() == 1
    before = {path: path.stat().st_mtime_ns for path in Path("made").glob("*.png")}
    os.unlink("made/b_2.png")
    capsys.readouterr()
    table({"name": "a", "1.color": 1}, {"name": "b", "1.batch_size": 2}, {"name": "c", "1.width": 4})
    assert batch() == 0
    said = capsys.readouterr().err
    assert "1 of 3 rows are there already." in said
    assert "2 of 3 rows made." in said
    assert sorted(colours()) == ["a.png", "b_1.png", "b_2.png", "c.png"]
    assert Path("made/a.png").stat().st_mtime_ns == before[Path("made/a.png")]
    assert batch() == 0
    assert "3 of 3 rows are there already." in capsys.readouterr().err


def test_a_kill_at_any_moment_costs_one_row_and_leaves_no_second_picture(folder):
    """It comes between a row's line and its pictures, or within a line."""
    table({"name": "a", "1.color": 255}, {"name": "b", "1.batch_size": 2}, {"name": "c"})
    assert batch() == 0
    first, second, third = Path("made/batch.jsonl").read_bytes().splitlines(keepends=True)
    Path("made/batch.jsonl").write_bytes(first + second + third[: len(third) // 2])
    for name in ("a", "b_2", "c"):
        os.unlink(f"made/{name}.png")
    assert batch() == 0
    assert list(colours()) == ["a.png", "b_1.png", "b_2.png", "c.png"]
    assert batch() == 0


def test_no_picture_of_another_is_replaced(folder, capsys):
    Path("made").mkdir()
    Path("made/a.png").write_bytes(b"mine")
    Path("made/b_2.png").write_bytes(b"mine too")
    table({"name": "a"}, {"name": "b", "1.batch_size": 2}, {"name": "c"})
    assert batch() == 1
    assert Path("made/a.png").read_bytes() == b"mine"
    assert Path("made/b_2.png").read_bytes() == b"mine too"
    assert sorted(os.listdir("made")) == ["a.png", "b_2.png", "batch.jsonl", "c.png"]
    table({"name": "a"}, {"name": "c", "1.color": 255})
    assert batch() == 1
    said = capsys.readouterr().err
    assert "made/a.png is there already and is not of this batch; give the row another name." in said
    assert "made/c.png was made under this name with other values or another graph;" in said
    assert Image.open("made/c.png").getpixel((0, 0)) == (0, 0, 0)


def test_two_batches_do_not_write_one_list(folder, capsys):
    import fcntl

    Path("made").mkdir()
    table({"name": "a"})
    with open("made/batch.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert batch() == 1
    assert "Another `cascade batch` is writing made/batch.jsonl; wait for it" in capsys.readouterr().err
    assert batch() == 0


def test_two_batches_that_divide_the_rows_otherwise(folder, capsys, monkeypatch):
    """What another process makes meanwhile is neither made again nor taken for a picture of somebody else."""
    table(*({"name": name, "1.batch_size": 1 + (name == "c")} for name in "abc"))
    make = GraphWorker.make

    def make_others_too(worker: GraphWorker, job: Job):
        monkeypatch.setattr(GraphWorker, "make", make)
        assert batch("--shard", "1/1") == 0
        capsys.readouterr()
        return make(worker, job)

    monkeypatch.setattr(GraphWorker, "make", make_others_too)
    assert batch() == 0
    assert lines() == []
    assert [line["name"] for line in lines("batch.1-of-1.jsonl")] == ["a", "b", "c"]
    assert sorted(colours()) == ["a.png", "b.png", "c_1.png", "c_2.png"]
    said = capsys.readouterr().err
    assert "[2/3] b: made by another process" in said
    assert "3 of 3 rows made." in said


def test_nodes_with_the_same_inputs_run_once(folder):
    """Loaders are such nodes, which have the same inputs in every row."""
    started: list[str] = []

    class Listener(Observer):
        def node_started(self, index, total, name):
            started.append(name)

    worker = GraphWorker(Path("input"), Path(), None, Listener())
    for name in ("a", "b"):
        graph = GRAPH | {"2": node("SaveImage", images=["1", 0], filename_prefix=name)}
        assert len(worker.make(Job(name, graph, ("2",), "")).pictures) == 1
    assert started == ["1 (EmptyImage)", "2 (SaveImage)", "2 (SaveImage)"]


def test_a_grid_and_its_contact_sheet(folder):
    grid = ["--grid", "1.color=255,65280", "1.height=32,64,0"]
    assert main(["batch", "graph.json", "--output", "made", "--set", "1.width=32", *grid]) == 1
    pictures = colours()
    assert list(pictures) == [
        "grid_001_color-255_height-32.png",
        "grid_002_color-255_height-64.png",
        "grid_004_color-65280_height-32.png",
        "grid_005_color-65280_height-64.png",
        "grid_sheet.png",
    ]
    sheet = Image.open("made/grid_sheet.png")
    width, height = sheet.size
    cell, gap = 64, 8
    corners = [
        [
            sheet.getpixel((width - (3 - column) * (cell + gap), height - (2 - line) * (cell + gap)))
            for column in range(3)
        ]
        for line in range(2)
    ]
    grey = (0xDD, 0xDD, 0xDD)  # what could not be made
    assert corners == [[BLUE, BLUE, grey], [GREEN, GREEN, grey]]
    labels = (
        sheet.crop((0, 0, width - 3 * (cell + gap), height)),
        sheet.crop((0, 0, width, height - 2 * (cell + gap))),
    )
    for label in labels:
        shades = label.convert("L").histogram()
        assert sum(shades[:64]) > 0
        assert shades[255] > 0


def test_a_grid_without_a_contact_sheet(folder, capsys):
    """One that would be too large is refused before the work; one of a row's name replaces nothing."""
    wide = f"1.color={','.join(map(str, range(200)))}"
    assert main(["batch", "graph.json", "--output", "made", "--grid", wide]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "The grid has more pictures than a contact sheet shows, so none is drawn."
    assert len(colours()) == 200
    table({"name": "a_sheet", "1.color": 255})
    assert batch() == 0
    table({"name": "a"})
    assert batch("--grid", "1.color=1,2") == 0
    assert (
        "made/a_sheet.png is a row's picture, so no contact sheet is drawn there." in capsys.readouterr().err
    )
    assert colours()["a_sheet.png"] == BLUE


def test_a_grid_of_each_row(folder):
    table({"name": "a", "1.width": 16}, {"name": "b"})
    assert batch("--grid", "1.color=1,2") == 0
    assert list(colours()) == [
        "a_001_color-1.png", "a_002_color-2.png", "a_sheet.png", "b_001_color-1.png", "b_002_color-2.png",
        "b_sheet.png",
    ]  # fmt: skip


def test_shards_make_all_rows_once(folder, monkeypatch, capsys):
    """The last one draws the whole sheet; a run without shards has nothing left to do."""
    table(*({"name": f"r{number}"} for number in range(5)), {"name": "bad", "1.width": 0})
    assert batch("--shard", "1/3") == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert batch() == 0
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert batch() == 0  # though a row could not be made: torchrun would end the others
    names = [f"batch.{number}-of-3.jsonl" for number in (1, 2, 3)]
    assert [[line["name"] for line in lines(name)] for name in names] == [
        ["r0", "r3"], ["r1", "r4"], ["bad", "r2"],
    ]  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name)
    capsys.readouterr()
    assert batch() == 1
    assert "5 of 6 rows are there already." in capsys.readouterr().err
    assert sorted(colours()) == [f"r{number}.png" for number in range(5)]


def test_a_shard_lists_its_rows_where_all_are_wrong(folder, monkeypatch, capsys):
    """Under torchrun another exit status would end the shards whose rows are right."""
    table({"name": "a"}, {"name": "b", "1.width": 0}, {"name": "c"}, {"name": "d", "1.width": 0})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert batch() == 0
    assert [line["name"] for line in lines("batch.2-of-2.jsonl")] == ["b", "d"]
    assert "b: " in capsys.readouterr().err


def test_a_shard_without_rows_says_so(folder, capsys):
    table({"name": "a"}, {"name": "b"})
    assert batch("--shard", "5/8") == 0
    assert "None of the 2 rows is in shard 5/8." in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "1/10000000"])
def test_shards_that_there_are_not(text, folder, capsys):
    with pytest.raises(SystemExit):
        batch("--shard", text)
    assert "is not K/N with K from 1 to N, such as 3/8" in capsys.readouterr().err


def test_a_disk_that_is_full_ends_the_batch_and_a_re_run_makes_all(folder, capsys):
    names = [f"{number:02}" for number in range(20)]
    table(*({"name": name} for name in names))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2000, before[1])
    )  # the list grows past it before any picture does
    try:
        assert batch() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 0 < len(colours()) < 20
    assert capsys.readouterr().err.splitlines()[-1] == "error: made cannot be used (File too large)."
    assert batch() == 0
    assert list(colours()) == [f"{name}.png" for name in names]


def test_ctrl_c_while_rows_are_checked_makes_none(folder, capsys, monkeypatch):
    table(*({"name": name} for name in "abcd"))
    is_done, asked = Journal.is_done, []

    def interrupted(journal, job):
        asked.append(job.name)
        if job.name == "b":
            os.kill(os.getpid(), signal.SIGINT)
        return is_done(journal, job)

    monkeypatch.setattr(Journal, "is_done", interrupted)
    assert batch() == 130
    assert (asked, lines(), colours()) == (["a", "b"], [], {})
    assert "0 of 4 rows made, 4 left" in capsys.readouterr().err


def test_the_time_left_is_that_of_rows_after_the_first(monkeypatch, capsys):
    """In the first one, models are loaded. A row that another process made does not count as one in that time."""
    clock = iter([100.0, 110.0, 111.0, 130.0])
    monkeypatch.setattr("cascade_nodes.headless.batch.progress.time.monotonic", lambda: next(clock))
    progress = BatchProgress()
    progress.begin(100)
    progress.row_made("a", 90.0, [])
    progress.row_made("b", 10.0, [])
    progress.row_there("c")
    progress.row_made("d", 10.0, [])
    assert capsys.readouterr().err.splitlines() == [
        "[1/100] a: 90.0 s",
        "[2/100] b: 10.0 s, 16:20 left",
        "[3/100] c: made by another process, 17:47 left",
        "[4/100] d: 10.0 s, 24:00 left",
    ]


def test_a_table_of_too_many_rows(folder, capsys, monkeypatch):
    monkeypatch.setattr(rows, "_MOST_ROWS", 3)
    table(*({"name": name} for name in "abc"))
    assert batch() == 0
    table(*({"name": name} for name in "abcd"))
    assert batch() == 1
    assert "rows.jsonl holds more than 3 rows; cut it into several." in capsys.readouterr().err
    monkeypatch.setattr(rows, "_LARGEST_TABLE", 40)
    assert batch() == 1
    assert "rows.jsonl has 56 bytes, but 40 are the most; cut it into several." in capsys.readouterr().err


def test_ctrl_c_finishes_the_row_under_way(folder):
    table(*({"name": f"r{number}", "1.color": number} for number in range(500)))
    process = start("batch", "graph.json", "rows.jsonl", "--output", "made", cwd=folder)
    with process:
        while not (line := errors_of(process).readline()).startswith("[3/500] r2: "):
            assert line
        process.send_signal(signal.SIGINT)
        said = errors_of(process).read()
        assert process.wait() == 130
    assert "Stopping after " in said
    made = [line["name"] for line in lines()]
    assert 3 <= len(made) < 500
    assert sorted(colours()) == sorted(f"{name}.png" for name in made)
    assert (
        f"{len(made)} of 500 rows made, {500 - len(made)} left; the same command goes on with them." in said
    )


def test_an_output_folder_that_goes_away_ends_the_batch_and_a_re_run_makes_all(folder, capsys, monkeypatch):
    """Without that, pictures came into a new folder without a list, where a re-run refused them as not its own."""
    table(*({"name": f"r{number}", "1.color": number} for number in range(4)))
    run, made = GraphWorker.make, []

    def run_and_lose(self, job):
        made.append(job.name)
        if len(made) == 2:
            shutil.rmtree("made")
        return run(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(GraphWorker, "make", run_and_lose)
        assert batch() == 1
    assert made == ["r0", "r1"]
    assert "made/batch.jsonl was removed while the batch was recording" in capsys.readouterr().err
    assert not Path("made").exists()
    assert batch() == 0
    assert sorted(colours()) == [f"r{number}.png" for number in range(4)]
