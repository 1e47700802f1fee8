"""A client of a ComfyUI server may be hostile: it must not read, write, learn or block anything through our nodes."""

import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from cascade_nodes.tests.comfyui.client import Client
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
    """The same graph with an input over a link, whose value ComfyUI does not validate."""
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
    folder.mkdir(exist_ok=True)
    if not (folder / "star.png").exists():
        Image.new("RGB", (64, 64), "red").save(folder / "star.png")
        (folder / "star.txt").write_text(f"a star {SECRET}")


def refusal(client, graph):
    """Why a graph was refused before it was queued."""
    status, answer = client.post("/prompt", {"prompt": graph, "client_id": client.id})
    assert status == 400, answer
    (error,) = {each["details"].partition(" - ")[2] for each in answer["node_errors"]["1"]["errors"]}
    return error


def refused(client, name, value):
    """Asserts the same refusal before the graph is queued and where the value comes over a link."""
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
    for name in ("x" * 5000, "a/" * 10**6):  # looked at part by part, the second would take hours
        assert "is not in ComfyUI's input folder" in refused(client, "pictures", name)
    link = server.base / "input" / "link"
    link.symlink_to(outside)
    assert str(outside) not in refused(client, "pictures", "link")
    (server.base / "input" / "stars" / "link.png").symlink_to(outside / "star.png")
    execution = client.run(training(name="leading_out"))
    assert execution.error is None
    (told,) = [text for _, text in execution.texts if "left out" in text]
    assert "link.png (it cannot be read: a link that leads out of the folders that may be read)" in told
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
        ("# " + "x" * 20_000, "settings has 20,002 characters; give at most 20,000."),
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
    # Before ComfyUI makes folders of the names that it is asked for.
    for place in ("..", "../__cascade_nodes", "__cascade_nodes", "."):
        for address in ("/userdata?recurse=true&dir=", "/v2/userdata?path="):
            assert log.parent.name not in (served(server, address + urllib.parse.quote(place, safe="")) or "")
    for path in (log, *runs.glob("cache/*/*.safetensors")):
        relative = path.relative_to(server.base / "user")
        for place in (f"../user/{relative}", f"../{relative}", str(relative), str(path)):
            folder, _, name = place.rpartition("/")
            query = urllib.parse.urlencode({"filename": name, "subfolder": folder})
            quoted = urllib.parse.quote(place, safe="")
            for address in (f"/view?{query}", f"/view?{query}&type=input", f"/userdata/{quoted}"):
                assert served(server, address) is None, address


def served(server, address):
    """A server's answer to a client that calls itself by our folder's name; None if it refuses."""
    request = urllib.request.Request(server.url + address, headers={"comfy-user": "__cascade_nodes"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode(errors="replace")
    except urllib.error.HTTPError:
        return None


def test_messages_hold_no_html_and_go_to_their_own_browser(client, server):
    folder = server.base / "input" / "hostile"
    write_pictures(folder)
    shutil.copy(folder / "star.png", folder / "<img src=x onerror=alert(1)>\x1b[2J.png")
    with Client(server) as stranger:
        execution = client.run(training(pictures="hostile", name="quiet"))
        stranger_id = stranger.queue({"1": node("PreviewAny", source="the stranger's own")})
        heard = stranger.follow(stranger_id)
    assert any("left out" in text for _, text in execution.texts)
    assert not any(letter in text for _, text in execution.texts for letter in "<>\x1b")
    assert heard.texts == []


MANY = 4000


@pytest.fixture
def many(server):
    """A folder with more pictures than are encoded in a moment."""
    folder = server.base / "input" / "many"
    if not folder.exists():
        write_pictures(folder)
        for number in range(MANY):
            os.link(folder / "star.png", folder / f"{number}.png")
            os.link(folder / "star.txt", folder / f"{number}.txt")
    return folder.name


@pytest.mark.parametrize(
    ("begun", "changes"),
    [
        (lambda kind, data: kind == "executing" and data["node"] == "1", {"pictures": "many"}),
        (lambda kind, data: kind == "progress" and data["max"] > MANY, {"pictures": "many"}),
        (lambda kind, data: kind == "progress" and data["max"] == 10**6, {"steps": 10**6, "name": "endless"}),
        (
            lambda kind, data: "accumulate" in str(data) or kind == "executing",
            {"settings": "train: {accumulate: 65536}", "name": "endless"},
        ),
    ],
    ids=["while pictures are listed", "while latents are made", "while it trains", "within a step"],
)
def test_an_interrupt_ends_what_would_take_long(client, many, begun, changes):
    asked = []

    def interrupt(kind, data):
        if not asked and begun(kind, data):
            asked.append(client.post("/interrupt", {}))

    execution = client.follow(client.queue(training(size=256, **changes)), interrupt)
    assert execution.of("execution_interrupted")
    assert client.run({"1": node("PreviewAny", source=str(changes))}).of("execution_success")


def test_the_curve_and_the_samples_are_shown_while_it_trains(client):
    settings = "models: {previewer: tiny_previewer.safetensors}\n"
    settings += "output: {log_every: 1, sample_every: 2, prompts: [a star], sample_steps: 1}"
    execution = client.run(training(steps=3, size=64, name="shown", settings=settings))
    assert execution.error is None
    first, *_, last = execution.previews  # the samples before the first step; in the end the curve above them
    assert first.shape[0] == first.shape[1]
    assert last.shape[0] < last.shape[1]


SOURCES = {
    "MODEL": node("StageCLoader", file="tiny_stage_c.safetensors", dtype="auto"),
    "CLIP": node("CascadeTextEncoderLoader", file="tiny_text_encoder"),
    "VAE": node("StageAVAE", file="tiny_stage_a.safetensors"),
    "IMAGE": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
    "MASK": node("SolidMask", value=1.0, width=64, height=64),
    "CONDITIONING": node("CascadeTextEncode", clip=["CLIP", 0], positive="a star", negative=""),
    "LATENT": node("CascadeEmptyLatent", width=64, height=64, compression=32.0, batch_size=1),
    "CONTROL_NET": node("CascadeControlNetLoader", file="none"),
    "CLIP_VISION": node("CascadeVisionLoader", file="none"),
}


def hostile(server):
    """Texts for every input: files that are there, outside and inside of a model folder, and no files' names."""
    return [
        f"{server.base}/private/secret.safetensors",
        "../../private/secret.safetensors",
        "notes.txt",
        "embedding:../../private/secret embedding:/etc/passwd (a:",
        "\0\ud800<img src=x>\x1b[2J",
        "../" * 2000,
    ]


def asking(info, name, value, link):
    """A graph with one of our nodes, an input of it hostile, itself or over a link."""
    inputs = {}
    for input_id, (kind, *options) in {
        **info["input"]["required"],
        **info["input"].get("optional", {}),
    }.items():
        if kind in SOURCES:
            inputs[input_id] = [kind, 0]
        elif options and "default" in options[0]:
            inputs[input_id] = options[0]["default"]
    known = GIVEN if info["name"].startswith("CascadeTrain") else {}
    inputs |= {key: known[key] for key in known if key in inputs or key in MODELS_OF_TRAINING}
    inputs[name] = ["text", 0] if link else value
    graph = {**SOURCES, "asked": node(info["name"], **inputs)}
    if link:
        graph["text"] = node("PrimitiveString", value=value)
    if not info["output_node"]:
        graph["shown"] = node("PreviewAny", source=["asked", 0])
    return graph


MODELS_OF_TRAINING = ("stage_c", "text_encoder", "compressor")
NOT_OURS = {"exception_during_validation", "exception_during_inner_validation"}


@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_no_input_of_any_node_reaches_a_file(client, server, each):
    """Every text and choice of every node, themselves and over a link. each: with every hostile text, not with two."""
    secret = server.base / "private" / "secret.safetensors"
    secret.parent.mkdir(exist_ok=True)
    shutil.copy(server.base / "models" / "diffusion_models" / "tiny_stage_c.safetensors", secret)
    for folder in ("loras", "vae", "diffusion_models", "stable_cascade"):
        (server.base / "models" / folder).mkdir(exist_ok=True)
        (server.base / "models" / folder / "notes.txt").write_text(SECRET)
    answers = []
    for info in server.get("/object_info").values():
        if not info["category"].startswith("Stable Cascade"):
            continue
        for name, (kind, *_) in {**info["input"]["required"], **info["input"].get("optional", {})}.items():
            if kind not in ("STRING", "COMBO") and not isinstance(kind, list):
                continue
            values = hostile(server)
            asked = [(value, link) for value in values for link in (False, True)]
            if not each:
                turn = len(answers) // 2
                asked = [(values[turn % len(values)], False), (values[(turn + 3) % len(values)], True)]
            for value, link in asked:
                graph = asking(info, name, value, link)
                answers.append((info["name"], name, value, link, told(client, graph)))
    assert len({answer[:2] for answer in answers}) > 30
    for answer in answers:
        assert SECRET not in str(answer[-1]), answer


def told(client, graph):
    """What a client hears of a graph: an error, or nothing."""
    status, answer = client.post("/prompt", {"prompt": graph, "client_id": client.id})
    if status != 200:
        kinds = {error["type"] for each in answer["node_errors"].values() for error in each["errors"]}
        assert not kinds & NOT_OURS, (graph["asked"], answer)
        return json.dumps(answer)
    execution = client.follow(answer["prompt_id"])
    for error in execution.of("execution_error"):
        assert error["node_id"] == "asked", (graph["asked"], error)
        assert error["exception_type"].endswith("CascadeError"), (graph["asked"], error)
        assert len(error["exception_message"]) < 1500
        return error["exception_message"]
    return json.dumps(execution.of("executed"))
