"""LoadImage, LoadImageMask, SaveImage and PreviewImage through whole graphs, on real files."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cascade_nodes.cascade_core.errors import quoted
from cascade_nodes.headless import Executor, run_graph
from cascade_nodes.headless.builtin import BUILTIN_NODES
from cascade_nodes.headless.execution import NodeError
from cascade_nodes.headless.registry import by_id
from cascade_nodes.headless.sentences import GraphError
from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.headless.toy_nodes import TOYS

NODES = by_id(BUILTIN_NODES) | TOYS
GRADIENT = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
COPY = {
    "1": node("LoadImage", image="in.png"),
    "2": node("SaveImage", images=["1", 0], filename_prefix="out"),
}


@pytest.fixture
def folder(tmp_path):
    """An input folder with a picture in it, and room for the output."""
    (tmp_path / "input").mkdir()
    Image.fromarray(GRADIENT).save(tmp_path / "input" / "in.png")
    return tmp_path


def run(graph, folder, **more):
    options = {"input_folder": folder / "input", "output_folder": folder / "output", "nodes": NODES, **more}
    return run_graph(graph, **options)


def texts_in(path: Path) -> dict[str, Any]:
    """The JSON in a PNG file's text chunks."""
    with Image.open(path) as picture:
        assert isinstance(picture, PngImageFile)
        return {name: json.loads(value) for name, value in picture.text.items()}


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_picture_survives_loading_and_saving(folder):
    result = run(COPY, folder)
    assert result.outputs == {
        "2": {"images": [{"filename": "out_00001_.png", "subfolder": "", "type": "output"}]}
    }
    (picture,) = result.pictures
    assert picture.path == folder / "output" / "out_00001_.png"
    assert picture.node_id == "2"
    assert 0 < picture.seconds <= result.seconds
    assert np.array_equal(np.asarray(Image.open(picture.path)), GRADIENT)
    assert texts_in(picture.path) == {"prompt": COPY}
    assert files_in(folder / "output") == ["out_00001_.png"]


def test_the_graph_inside_is_the_one_that_ran(folder):
    notes = {"workflow": {"nodes": [], "name": "星"}}
    result = run(COPY, folder, assignments=["2.filename_prefix=other"], extra_pnginfo=notes)
    texts = texts_in(result.pictures[0].path)
    assert texts["prompt"]["2"]["inputs"]["filename_prefix"] == "other"
    assert texts["workflow"] == notes["workflow"]


def test_numbers_go_on_and_nothing_is_overwritten(folder):
    out = folder / "output"
    out.mkdir()
    (out / "out_00007_.png").write_bytes(b"mine")
    (out / "outer_00009_.png").write_bytes(b"another prefix")
    (out / "out_x.png").write_bytes(b"no number")
    assert run(COPY, folder).pictures[0].path.name == "out_00008_.png"
    assert run(COPY, folder).pictures[0].path.name == "out_00009_.png"
    assert (out / "out_00007_.png").read_bytes() == b"mine"


def test_a_kept_run_saves_again_only_where_that_is_new(folder):
    executor = Executor()
    run(COPY, folder, executor=executor)
    run(COPY, folder, executor=executor)
    assert files_in(folder / "output") == ["out_00001_.png"]
    result = run(COPY, folder, executor=executor, output_folder=folder / "elsewhere")
    assert result.timings.keys() == {"2"}
    assert files_in(folder / "elsewhere") == ["out_00001_.png"]


def test_a_changed_picture_is_loaded_again(folder):
    executor = Executor()
    run(COPY, folder, executor=executor)
    Image.fromarray(255 - GRADIENT).save(folder / "input" / "in.png")
    result = run(COPY, folder, executor=executor)
    assert result.timings.keys() == {"1", "2"}
    with Image.open(result.pictures[0].path) as saved:
        assert np.array_equal(np.asarray(saved), 255 - GRADIENT)


def test_every_picture_of_a_batch_is_saved(folder):
    frames = [Image.fromarray(GRADIENT), Image.fromarray(255 - GRADIENT)]
    frames[0].save(folder / "input" / "in.png", save_all=True, append_images=frames[1:])
    result = run(COPY, folder, assignments=["2.filename_prefix=sub/%batch_num%_%width%x%height%"])
    assert [entry["subfolder"] for entry in result.outputs["2"]["images"]] == ["sub", "sub"]
    assert files_in(folder / "output") == ["sub/0_6x4_00001_.png", "sub/1_6x4_00001_.png"]
    with Image.open(result.pictures[1].path) as saved:
        assert np.array_equal(np.asarray(saved), 255 - GRADIENT)


def test_a_preview_goes_to_the_temporary_folder(folder):
    graph = {"1": node("LoadImage", image="in.png"), "2": node("PreviewImage", images=["1", 0])}
    result = run(graph, folder)
    (entry,) = result.outputs["2"]["images"]
    assert entry["type"] == "temp"
    assert result.pictures[0].path == folder / "output" / "temp" / entry["filename"]
    assert result.pictures[0].path.is_file()


PREFIXES = {
    "../out": "leads out of the folder",
    "/out": "leads out of the folder",
    "a/../../out": "leads out of the folder",
    "..\\out": "leads out of the folder",
    "link/out": "leads out of the folder over a link",
    "": "names no file",
    ".": "names no file",
    "sub/": "names no file",
    "sub\\": "names no file",
    "sub/..": "names no file",
    "a\0b": "holds control characters",
    "a\x1b[2Jb": "holds control characters",
    "a\ud800": "holds control characters",
    ".hidden": "begins with a dot, which hides a file",
    "x" * 300: "is longer than 200 bytes",
    "con/x": "is a device of Windows",
}


@pytest.mark.parametrize(("prefix", "reason"), PREFIXES.items(), ids=ascii)
def test_a_prefix_names_a_file_in_the_output_folder(folder, calls, prefix, reason):
    """Refused before anything runs; where the prefix comes from another node, before anything is written."""
    output = folder / "output"
    output.mkdir()
    (output / "link").symlink_to(folder)
    sentence = f"Cannot save as {quoted(prefix)}, which {reason}; name a file inside {output}."
    graph = {"1": node("ToyImage"), "2": node("SaveImage", images=["1", 0], filename_prefix=prefix)}
    with pytest.raises(GraphError) as caught:
        run(graph, folder)
    assert str(caught.value) == f"Node 2 (SaveImage): input 'filename_prefix': {sentence}"
    assert calls == []
    graph["3"] = node("ToyText", text=prefix, mode="soft")
    graph["2"]["inputs"]["filename_prefix"] = ["3", 1]
    if prefix in ("../out", "link/out"):
        with pytest.raises(NodeError, match=r"Node 2 \(SaveImage\): Cannot save as .* leads out"):
            run(graph, folder)
    assert files_in(folder) == ["input/in.png"]


def test_patterns_of_the_canvas_are_filled_in(folder):
    assignments = ["2.filename_prefix=%date:yyyy%\\%LoadImage.image%_%width%"]
    picture = run(COPY, folder, assignments=assignments).pictures[0]
    year = f"{time.localtime().tm_year}"
    assert picture.path == folder / "output" / year / "in.png_6_00001_.png"
    assert texts_in(picture.path)["prompt"]["2"]["inputs"]["filename_prefix"] == f"{year}\\in.png_%width%"


def test_a_prefix_with_the_separators_of_windows_names_the_same_folder(folder):
    result = run(COPY, folder, assignments=["2.filename_prefix=sub\\red"])
    assert result.outputs["2"]["images"][0]["subfolder"] == "sub"
    assert files_in(folder / "output") == ["sub/red_00001_.png"]


def test_pictures_with_nan_or_a_wrong_shape_are_not_saved(folder):
    def saving(value):
        class ToyPicture(io.ComfyNode):
            @classmethod
            def define_schema(cls):
                return io.Schema(node_id="ToyPicture", outputs=[io.Image.Output()])

            @classmethod
            def execute(cls):
                return io.NodeOutput(value)

        graph = {"1": node("ToyPicture"), "2": node("SaveImage", images=["1", 0], filename_prefix="a")}
        return run(graph, folder, nodes=NODES | {"ToyPicture": ToyPicture})

    picture = torch.zeros(2, 4, 4, 3)
    picture[1, 2, 2, 0] = float("nan")
    with pytest.raises(NodeError, match="Picture 1 of the batch holds NaN or infinity"):
        saving(picture)
    with pytest.raises(
        NodeError, match=r"has the shape \(4, 4, 3\), but \(batch, height, width, 3\) was expected"
    ):
        saving(torch.zeros(4, 4, 3))
    saved = saving(torch.tensor([-1.0, 0.5, 2.0]).expand(1, 2, 2, 3)).pictures[0]
    assert np.asarray(Image.open(saved.path))[0, 0].tolist() == [0, 127, 255]


def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(folder, calls):
    (folder / "file").write_bytes(b"")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    graph = {"1": node("ToyImage"), "2": node("SaveImage", images=["1", 0], filename_prefix="out")}
    preview = {"1": node("ToyImage"), "2": node("PreviewImage", images=["1", 0])}
    for output, reason in {
        folder / "file": "Not a directory",
        folder / "file" / "output": "Not a directory",
        folder / "loop": "Too many levels of symbolic links",
        folder / "loop" / "inner": "Too many levels of symbolic links",
        folder / "dangling": "No such file or directory",
        Path("/proc/nowhere"): "No such file or directory",
        folder / ("x" * 300): "File name too long",
        folder / "a\0b": "Invalid argument",
    }.items():
        for nodes in (graph, preview):
            with pytest.raises(GraphError, match=rf"Cannot save .*: {reason}; choose a "):
                run(nodes, folder, output_folder=output)
    assert calls == []
    assert files_in(folder) == ["file", "input/in.png"]


def test_load_image_mask_in_a_graph(folder):
    graph = {
        "1": node("LoadImageMask", image="in.png", channel="green"),
        "2": node("ToyImage", mask=["1", 0]),
    }
    graph |= {"3": node("PreviewImage", images=["2", 0])}
    assert run(graph, folder).timings.keys() == {"1", "2", "3"}
    graph["1"]["inputs"]["channel"] = "cyan"
    with pytest.raises(
        GraphError, match="input 'channel' is 'cyan', but it must be one of: alpha, red, green, blue"
    ):
        run(graph, folder)


def test_where_a_picture_is_looked_for(folder, monkeypatch):
    elsewhere = folder / "graphs"
    elsewhere.mkdir()
    (folder / "input" / "in.png").rename(elsewhere / "beside.png")
    (elsewhere / "input").mkdir()
    shutil.copy(elsewhere / "beside.png", elsewhere / "input" / "inside.png")
    graph = elsewhere / "graph.json"
    for name in ("beside.png", str(elsewhere / "beside.png"), "graphs/beside.png", "inside.png"):
        graph.write_text(json.dumps({**COPY, "1": node("LoadImage", image=name)}))
        monkeypatch.chdir(folder)
        run(graph, folder)
    again = {**COPY, "1": node("LoadImage", image="out_00001_.png [output]")}
    assert len(run(again, folder).pictures) == 1


def test_a_missing_picture_is_an_error_of_the_graph(folder):
    with pytest.raises(GraphError) as caught:
        run({**COPY, "1": node("LoadImage", image="gone.png")}, folder)
    assert str(caught.value) == (
        f"Node 1 (LoadImage): input 'image': There is no picture 'gone.png' "
        f"(looked for {folder}/input/gone.png, gone.png); give the name of a file."
    )
    with pytest.raises(GraphError, match="5 is not the name of a file"):
        run({**COPY, "1": node("LoadImage", image=5)}, folder)
    with pytest.raises(GraphError, match="There is no picture"):
        run({**COPY, "1": node("LoadImage", image="x" * 5000)}, folder)


def test_a_file_that_is_no_picture(folder):
    picture = folder / "input" / "in.png"
    whole = picture.read_bytes()
    picture.write_text("hello")
    with pytest.raises(GraphError, match=r"Node 1 \(LoadImage\): input 'image': .*in.png is not a picture"):
        run(COPY, folder)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    picture.write_bytes(picture.read_bytes()[:5000])
    with pytest.raises(NodeError, match=r"The picture .*in.png cannot be read: image file is truncated"):
        run(COPY, folder)
    picture.write_bytes(whole)
    assert run(COPY, folder).pictures
