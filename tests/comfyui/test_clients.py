"""A client of a ComfyUI server may be a stranger: what it must not read, write, learn or hold up by our nodes."""

import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from cascade_nodes.tests.headless.record_comfyui import node

GIVEN = {
    "name": "style",
    "pictures": "stars",
    "stage_c": "tiny_stage_c.safetensors",
    "text_encoder": "tiny_text_encoder",
    "compressor": "tiny_compressor.safetensors",
    "size": 64,
    "steps": 2,
    "batch_size": 1,
    "learning_rate": 1e-4,
    "seed": 0,
    "rank": 2,
    "settings": "",
}
SECRET = "nobody's business"


def training(**changes):
    """A graph that trains a LoRA."""
    return {"1": node("CascadeTrainLoRA", **{**GIVEN, **changes})}


def linked(graph, name):
    """The same, with an input over a link: ComfyUI then does not validate its value."""
    value = graph["1"]["inputs"][name]
    kind = "PrimitiveStringMultiline" if "\n" in value else "PrimitiveString"
    inputs = {**graph["1"]["inputs"], name: ["2", 0]}
    return {"1": node("CascadeTrainLoRA", **inputs), "2": node(kind, value=value)}


@pytest.fixture
def outside(server):
    """A folder beside ComfyUI's own, with a picture."""
    folder = server.base / "private"
    write_pictures(folder)
    return folder


@pytest.fixture(autouse=True)
def stars(server):
    """A folder of pictures in the input folder."""
    write_pictures(server.base / "input" / "stars")


def write_pictures(folder):
    if not folder.exists():
        folder.mkdir()
        Image.new("RGB", (64, 64), "red").save(folder / "star.png")
        (folder / "star.txt").write_text(f"a star {SECRET}")


def refusal(client, graph):
    """Why a graph was refused before it was queued."""
    status, answer = client.post("/prompt", {"prompt": graph, "client_id": client.id})
    assert status == 400, answer
    (error,) = {each["details"].partition(" - ")[2] for each in answer["node_errors"]["1"]["errors"]}
    return error


def refused(client, name, value):
    """The same sentence before the graph is queued, and where the value comes over a link."""
    graph = training(**{name: value})
    sentence = refusal(client, graph)
    assert (client.run(linked(graph, name)).error or "").strip() == sentence
    assert SECRET not in sentence
    return sentence


def test_pictures_outside_are_refused_whatever_is_there(client, server, outside):
    real, missing = (refused(client, "pictures", str(path)) for path in (outside, outside / "none"))
    assert real.replace(str(outside), "X") == missing.replace(str(outside / "none"), "X")
    assert f'the line picture_folders: ["{outside}"] into {server.base}/user/cascade_nodes.yaml' in real
    for name in ("../private", "/", "stars/../../private", "/etc/passwd", "a\0b"):
        assert "is not in ComfyUI's input folder" in refused(client, "pictures", name)
    assert "does not exist" in refused(client, "pictures", "x" * 5000)
    link = server.base / "input" / "link"
    link.symlink_to(outside)
    assert str(outside) not in refused(client, "pictures", "link")
    (server.base / "input" / "stars" / "link.png").symlink_to(outside / "star.png")
    execution = client.run(training(name="leading_out"))
    assert execution.error is None
    (told,) = [text for _, text in execution.texts if "left out" in text]
    assert "link.png (a link that leads out of the folders that may be read)" in told
    assert not any(str(outside) in text for _, text in execution.texts)
    (server.base / "input" / "stars" / "link.png").unlink()
    link.unlink()


def test_the_owner_may_open_a_folder(client, server, outside):
    settings = server.base / "user" / "cascade_nodes.yaml"
    settings.write_text(f'picture_folders: ["{outside}"]\n')
    try:
        execution = client.run(training(pictures=str(outside), name="opened"))
        assert execution.error is None
        assert execution.of("executed") or execution.of("execution_success")
        settings.write_text(f"picture_folders: [{SECRET}\n")
        assert refused(client, "pictures", str(outside)).endswith(
            "cannot be used; the server's log says why."
        )
        assert client.run(training(steps=1)).error is None
    finally:
        settings.unlink()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("data: {tars: /etc/*.tar}", "is not in ComfyUI's input folder"),
        ("data: {tars: [stars/a.tar, '../{0..1}.tar']}", "is not in ComfyUI's input folder"),
        ("data: {cache: /tmp/x}", "data.cache is decided by the node's other inputs"),
        ("data: {<<: {folder: /etc}}", "settings is not YAML"),
        ("output: {file: /tmp/x}", "output.file is decided by the node's other inputs"),
        ("output: {folder: /tmp/x}", "output.folder is decided by the node's other inputs"),
        ("models: {previewer: /etc/passwd}", "is not the name of a model file"),
        ("models: {stage_c: ../../private/star.png}", "is not the name of a model file"),
        ("data: {size: !!python/object/apply:os.system [id]}", "settings is not YAML"),
    ],
)
def test_settings_name_nothing_outside(client, settings, sentence):
    assert sentence in refused(client, "settings", settings)


@pytest.mark.parametrize("name", ["../style", "/tmp/style", "", "a\0b", "..\\style", "x" * 201, "sub/"])
def test_a_name_stays_in_the_models_folder(client, name):
    assert refused(client, "name", name).startswith("name is ")


def test_nothing_is_overwritten_and_nothing_served(client, server):
    mine = server.base / "models" / "loras" / "mine.safetensors"
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    for spelling in ("mine", "./mine", "mine.safetensors"):
        assert client.run(training(name=spelling)).error is None
    assert mine.read_bytes() == b"mine"
    assert {path.name for path in mine.parent.glob("mine*")} == {
        "mine.safetensors", "mine_00001.safetensors", "mine_00002.safetensors", "mine_00003.safetensors"
    }  # fmt: skip
    runs = server.base / "user" / "__cascade_nodes" / "training"
    (log,) = runs.glob("lora_mine_*/log.jsonl")
    assert not list(server.base.glob("output/**/log.jsonl"))
    for path in (log, *runs.glob("cache/*/*.safetensors")):
        relative = path.relative_to(server.base / "user")
        for place in (f"../user/{relative}", f"../{relative}", str(relative), str(path)):
            quoted = urllib.parse.quote(place, safe="")
            folder, _, name = place.rpartition("/")
            query = urllib.parse.urlencode({"filename": name, "subfolder": folder})
            for address in (f"/view?{query}", f"/view?{query}&type=input", f"/userdata/{quoted}"):
                with pytest.raises(urllib.error.HTTPError):
                    urllib.request.urlopen(f"{server.url}{address}", timeout=60)
