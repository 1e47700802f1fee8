"""`cascade fetch` against a stand-in for the hub: files come whole and verified, or not at all."""

import hashlib
import os
import re
import signal

import numpy as np
import pytest

from cascade_nodes.headless import fetch as fetching
from cascade_nodes.headless.catalogue import FILES, STABILITY
from cascade_nodes.headless.cli import main
from cascade_nodes.tests.headless.command import start
from cascade_nodes.tests.headless.hub import COMMIT, Hub
from cascade_nodes.tests.obstacles import files_limited_to, permissions_respected

REPO = "stabilityai/stable-cascade"
CHUNK = 10 * 2**20  # what huggingface_hub reads at once, and so what a cut can cost
CONTENT = np.random.default_rng(0).bytes(2 * CHUNK + 12345)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SHORT = b"the previewer"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASCADE_MODELS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = {
        (REPO, "stage_a.safetensors"): CONTENT,
        (REPO, "previewer.safetensors"): SHORT,
        (REPO, "text_encoder/model.safetensors"): SHORT,
    }
    hub = Hub(files)
    yield hub
    hub.stop()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "models" / "vae" / "stage_a.safetensors"


def fetch(hub, *names):
    return main(["fetch", *(names or ["stage_a"]), "--endpoint", hub.url])


def failing(hub, capsys, *names):
    """The one sentence that a fetch which fails ends with."""
    assert fetch(hub, *names) == 1
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert err.count("error: ") == 1
    return line.removeprefix("error: ")


def left(target):
    """Every file in the target's folder."""
    return sorted(path.name for path in target.parent.iterdir()) if target.parent.exists() else []


def cut_short(hub, capsys, at=CHUNK + 5000):
    """Runs a fetch whose connection ends after `at` bytes and whose hub is then down; returns the part that stays."""
    hub.cuts, hub.after_cut = [at], (503, "")
    error_text = failing(hub, capsys)
    hub.refusal = None
    hub.asked.clear()
    return error_text


def test_a_file_comes_whole_under_its_name(hub, target, capsys):
    assert fetch(hub) == 0
    out, err = capsys.readouterr()
    assert out == "models/vae/stage_a.safetensors\n"
    assert target.read_bytes() == CONTENT
    assert left(target) == ["stage_a.safetensors"]
    assert re.fullmatch(r"\[1/1\] stage_a  [#█]{24} 21/21 MB  \d+\.\d s", err.splitlines()[-1])
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_licence_is_said_before_anything_is_asked(hub, capsys):
    hub.refusal = (503, "")
    assert fetch(hub) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"stage_a (73.7 MB) of https://huggingface.co/{REPO}"
    assert lines[1].startswith("  licence: Stability AI Non-Commercial Research Community License (")
    assert lines[2] == f"  read it: {STABILITY.url}"


def test_a_generic_name_becomes_a_telling_one(hub, tmp_path):
    assert fetch(hub, "text_encoder") == 0
    saved = tmp_path / "models" / "text_encoders" / "stable_cascade_text_encoder.safetensors"
    assert saved.read_bytes() == SHORT


def test_several_files_each_once(hub, tmp_path, capsys):
    assert fetch(hub, "previewer", "stage_a", "previewer") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["models/vae/previewer.safetensors", "models/vae/stage_a.safetensors"]
    assert [line.split("  ")[0] for line in err.splitlines()[-2:]] == ["[1/2] previewer", "[2/2] stage_a"]
    assert len(hub.ranges()) == 2


@pytest.mark.parametrize("stated", [["elsewhere", "other"], []])
def test_where_files_go(hub, tmp_path, monkeypatch, stated, capsys):
    monkeypatch.setenv("CASCADE_MODELS", os.pathsep.join(stated))
    assert fetch(hub, "previewer") == 0
    assert "CASCADE_MODELS" not in capsys.readouterr().err
    root = tmp_path / (stated[0] if stated else "models")
    assert (root / "vae" / "previewer.safetensors").read_bytes() == SHORT
    assert main(["fetch", "previewer", "--endpoint", f"{hub.url}/", "--to", "here"]) == 0
    assert (tmp_path / "here" / "vae" / "previewer.safetensors").read_bytes() == SHORT
    assert capsys.readouterr().err.endswith("\nThe loaders look there with CASCADE_MODELS=here.\n")


def test_a_cut_is_resumed_within_the_same_fetch(hub, target):
    hub.cuts = [CHUNK + 5000]
    assert fetch(hub) == 0
    assert hub.ranges() == [None, f"bytes={CHUNK}-"]
    assert target.read_bytes() == CONTENT


def test_a_cut_leaves_a_part_and_the_next_fetch_goes_on_there(hub, target, capsys):
    error_text = cut_short(hub, capsys)
    assert "The hub answered 503" in error_text
    assert error_text.endswith("; what has arrived is kept, and the same command goes on from there.")
    (part,) = left(target)
    assert part == f".stage_a.safetensors.{SHA256[:16]}.part"
    assert (target.parent / part).read_bytes() == CONTENT[:CHUNK]

    assert fetch(hub) == 0
    assert hub.ranges() == [f"bytes={CHUNK}-"]
    assert target.read_bytes() == CONTENT
    assert left(target) == ["stage_a.safetensors"]


def test_a_connection_that_gives_nothing_any_more_is_given_up(hub, target, capsys):
    hub.cuts = [CHUNK + 5000] + [0] * 20
    error_text = failing(hub, capsys)
    assert error_text.startswith(
        f"stage_a did not come from {hub.url}/{REPO}/resolve/{COMMIT}/stage_a.safetensors ("
    )
    assert error_text.endswith("; what has arrived is kept, and the same command goes on from there.")
    (part,) = left(target)
    assert (target.parent / part).read_bytes() == CONTENT[:CHUNK]


def test_cut_again_and_again(hub, target, capsys):
    for arrived in (CHUNK, 2 * CHUNK):
        cut_short(hub, capsys)
        (part,) = left(target)
        assert (target.parent / part).stat().st_size == arrived
    assert fetch(hub) == 0
    assert hub.ranges() == [f"bytes={2 * CHUNK}-"]
    assert target.read_bytes() == CONTENT


def test_a_part_that_lacks_nothing_is_verified_and_named(hub, target):
    target.parent.mkdir(parents=True)
    (target.parent / f".stage_a.safetensors.{SHA256[:16]}.part").write_bytes(CONTENT)
    assert fetch(hub) == 0
    assert hub.ranges() == []
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_too_long_starts_anew(hub, target):
    target.parent.mkdir(parents=True)
    (target.parent / f".stage_a.safetensors.{SHA256[:16]}.part").write_bytes(CONTENT + b"more")
    assert fetch(hub) == 0
    assert hub.ranges() == [None]
    assert target.read_bytes() == CONTENT


def test_a_part_of_another_version_is_not_continued(hub, target, capsys):
    cut_short(hub, capsys)
    newer = CONTENT[::-1]
    hub.files[REPO, "stage_a.safetensors"] = newer
    hub.storage[hashlib.sha256(newer).hexdigest()] = newer
    assert fetch(hub) == 0
    assert hub.ranges() == [None]
    assert target.read_bytes() == newer


def test_a_server_that_cannot_begin_in_the_middle(hub, target, capsys):
    cut_short(hub, capsys)
    hub.knows_range = False
    assert fetch(hub) == 0
    assert target.read_bytes() == CONTENT


def test_a_damaged_file_is_refused_and_removed(hub, target, capsys):
    hub.storage[SHA256] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    error_text = failing(hub, capsys)
    assert error_text.startswith("stage_a arrived damaged (sha256 ")
    assert f"but the hub states {SHA256[:16]}… of {len(CONTENT)})" in error_text
    assert left(target) == []


def test_a_damaged_part_is_refused_and_removed(hub, target, capsys):
    target.parent.mkdir(parents=True)
    (target.parent / f".stage_a.safetensors.{SHA256[:16]}.part").write_bytes(b"\0" * CHUNK)
    assert failing(hub, capsys).startswith("stage_a arrived damaged")
    assert left(target) == []
    assert fetch(hub) == 0
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:5], CONTENT[1:], b"x" + CONTENT], ids=["cut", "late", "longer"])
def test_a_file_of_another_size_is_refused(hub, target, capsys, content):
    hub.storage[SHA256] = content
    error_text = failing(hub, capsys)
    size = min(len(content), len(CONTENT))  # no more than that is taken
    assert f" of {size} bytes, but the hub states {SHA256[:16]}… of {len(CONTENT)}) and was rem" in error_text
    assert left(target) == []


def test_a_whole_file_is_not_fetched_again(hub, target, capsys):
    assert fetch(hub) == 0
    before = target.stat()
    capsys.readouterr()
    assert fetch(hub) == 0
    out, err = capsys.readouterr()
    assert out == "models/vae/stage_a.safetensors\n"
    assert err.splitlines()[-1] == "[1/1] stage_a  already there, whole"
    assert len(hub.ranges()) == 1
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "difference"),
    [(b"mine", f"4 instead of {len(CONTENT)} bytes"), (b"\0" * len(CONTENT), "its sha256")],
    ids=["another size", "another content"],
)
def test_another_file_is_not_overwritten(hub, target, capsys, content, difference):
    target.parent.mkdir(parents=True)
    target.write_bytes(content)
    assert failing(hub, capsys) == (
        f"models/vae/stage_a.safetensors is there but is not the published stage_a ({difference}), and nothing is "
        "overwritten; move it away, or fetch into another folder (--to)."
    )
    assert target.read_bytes() == content
    assert hub.ranges() == []


def test_a_file_that_is_gone(hub, target, capsys):
    hub.files.clear()
    assert failing(hub, capsys) == (
        f"The hub has no stage_a.safetensors in {REPO} any more (404 for "
        f"{hub.url}/{REPO}/resolve/main/stage_a.safetensors); look at https://huggingface.co/{REPO}."
    )
    assert left(target) == []


@pytest.mark.parametrize(
    "refusal", [(403, "GatedRepo"), (401, "GatedRepo"), (403, ""), (401, "RepoNotFound")]
)
def test_a_file_that_is_not_for_everyone(hub, target, capsys, refusal):
    hub.refusal = refusal
    error_text = failing(hub, capsys)
    assert error_text.startswith(f"The hub does not give stage_a to everyone ({refusal[0]} for {hub.url}/")
    assert f"https://huggingface.co/{REPO}" in error_text
    assert "hf auth login" in error_text
    assert left(target) == []


def test_a_hub_that_cannot_be_reached(hub, target, capsys):
    hub.stop()
    error_text = failing(hub, capsys)
    assert error_text.startswith(
        f"stage_a did not come from {hub.url}/{REPO}/resolve/main/stage_a.safetensors ("
    )
    assert error_text.endswith("; look at the connection, or name a mirror (--endpoint, HF_ENDPOINT).")
    assert left(target) == []


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Size", "X-Linked-Etag"])
def test_what_cannot_be_verified_is_not_fetched(hub, target, capsys, header):
    hub.silent_about = {header}
    assert "states no commit, size and sha256" in failing(hub, capsys)
    assert hub.ranges() == []
    assert left(target) == []


def test_a_full_disk_keeps_the_part(hub, target, capsys):
    with files_limited_to(CHUNK + 4096):
        error_text = failing(hub, capsys)
    (part,) = left(target)
    assert error_text == (
        f"models/vae/{part} cannot be used (File too large); free some space; what has arrived is kept, and the same "
        "command goes on from there."
    )
    assert (target.parent / part).read_bytes() == CONTENT[: CHUNK + 4096]
    assert fetch(hub) == 0
    assert hub.ranges()[-1] == f"bytes={CHUNK + 4096}-"
    assert target.read_bytes() == CONTENT


def test_a_disk_that_is_too_small_is_known_beforehand(hub, target, capsys):
    """The hub states a size that no disk has."""
    hub.stated_size = 10**18
    error_text = failing(hub, capsys)
    assert error_text.startswith("models/vae has ")
    assert error_text.endswith(
        " free, but 1000000000 GB are still to come; free some space, or choose another folder (--to)."
    )
    assert hub.ranges() == []
    assert left(target) == []


def test_no_permission(hub, target, capsys):
    target.parent.mkdir(parents=True)
    target.parent.chmod(0o500)
    try:
        with permissions_respected():
            error_text = failing(hub, capsys)
    finally:
        target.parent.chmod(0o700)
    assert error_text == (
        "models/vae/stage_a.safetensors cannot be used (Permission denied); choose a folder that can be read and "
        "written to (--to)."
    )
    assert hub.ranges() == []
    assert left(target) == []


def test_a_file_where_the_folder_should_be(hub, target, tmp_path, capsys):
    (tmp_path / "models").write_text("hello")
    assert "models/vae/stage_a.safetensors cannot be used (Not a directory)" in failing(hub, capsys)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stage_d", "did you mean stage_c, stage_b, stage_a?"),
        ("stage_c_light_bf16.safetensors", "did you mean stage_c_lite_bf16, "),
        ("Text_To_Image", "did you mean text_to_image, "),
        ("sdxl", "`cascade models` lists what there is."),
    ],
)
def test_an_unknown_name(hub, capsys, name, hint):
    assert main(["fetch", name, "--endpoint", hub.url]) == 1
    error_text = capsys.readouterr().err
    assert error_text.startswith(f"error: There is no published file or workflow {name!r}; {hint}")
    assert error_text.count("\n") == 1
    assert hub.asked == []


def test_the_token_goes_to_the_hub_alone_and_the_bytes_are_of_one_commit(hub):
    assert fetch(hub) == 0
    tokens = [(method, path, headers.get("authorization")) for method, path, headers in hub.asked]
    assert tokens == [
        ("HEAD", f"/{REPO}/resolve/main/stage_a.safetensors", "Bearer hf_secret"),
        ("GET", f"/{REPO}/resolve/{COMMIT}/stage_a.safetensors", "Bearer hf_secret"),
        ("GET", f"/storage/{SHA256}", None),
    ]


def test_nothing_but_the_file_is_asked_for(hub, tmp_path, target):
    """A process of its own, by HF_ENDPOINT, uses no telemetry and no xet, and leaves nothing in a cache."""
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "AI_AGENT": "someone"}
    with start("fetch", "stage_a", cwd=tmp_path, env=environment) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == "models/vae/stage_a.safetensors\n"
    assert target.read_bytes() == CONTENT
    assert [path.split("/")[1] for _, path, _ in hub.asked] == ["stabilityai", "stabilityai", "storage"]
    agents = {headers["user-agent"] for _, _, headers in hub.asked}
    assert all(re.fullmatch(r"cascade-nodes/[\w.]+; hf_hub/[\w.]+; python/[\w.]+", agent) for agent in agents)
    assert not home.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "SIGTERM"])
def test_a_signal_leaves_a_part_and_says_so(hub, tmp_path, target, number):
    hub.cuts, hub.stalls = [CHUNK + 5000], True
    with start("fetch", "stage_a", "--endpoint", hub.url, cwd=tmp_path) as process:
        assert hub.cut.wait(60)
        part = target.with_name(f".stage_a.safetensors.{SHA256[:16]}.part")
        while part.stat().st_size < CHUNK:
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-2:] == [
        "What has arrived is kept; the same command goes on from there.",
        "Stopped.",
    ]
    assert left(target) == [part.name]
    assert part.read_bytes() == CONTENT[:CHUNK]
    assert fetch(hub) == 0
    assert hub.ranges() == [None, f"bytes={CHUNK}-"]
    assert target.read_bytes() == CONTENT


def test_two_at_once_do_not_mix(hub, tmp_path, target, capsys):
    hub.cuts, hub.stalls = [CHUNK + 5000], True
    with start("fetch", "stage_a", "--endpoint", hub.url, cwd=tmp_path) as process:
        assert hub.cut.wait(60)
        assert failing(hub, capsys).endswith(
            ".part is being fetched by another process; wait until it is done."
        )
        hub.released.set()
        assert process.wait() == 0
    assert target.read_bytes() == CONTENT


def test_folders_are_those_that_loaders_look_in():
    from cascade_nodes.nodes.hosts import roles

    for file in FILES.values():
        looked_in = {name for category in roles.FOLDERS[file.role] for name in roles.subfolders(category)}
        assert file.folder in looked_in, file.name
        assert file.saved_as.endswith(".safetensors")
    targets = [fetching.target_path(file, fetching.Path()) for file in FILES.values()]
    assert len(set(targets)) == len(FILES)
    assert not any(target.name == "model.safetensors" for target in targets)


def test_more_than_is_stated_is_not_waited_for(hub, target):
    """A server sends for ever and states no length: the file is whole, and what follows is not read."""
    hub.endless = b"more" * 2**20
    assert fetch(hub) == 0
    assert target.read_bytes() == CONTENT


def test_bytes_for_ever_in_place_of_the_file(hub, target, capsys):
    hub.storage[SHA256], hub.endless = b"", b"\0" * CHUNK
    assert "stage_a arrived damaged (sha256 " in failing(hub, capsys)
    assert left(target) == []


def test_far_more_than_was_published_is_not_begun(hub, target, capsys):
    hub.stated_size = 10**8
    assert failing(hub, capsys) == (
        f"{hub.url}/{REPO}/resolve/{COMMIT}/stage_a.safetensors is said to have 100 MB, but the published stage_a has "
        "73.7 MB; give the address of the hub or of a whole mirror (--endpoint, HF_ENDPOINT)."
    )
    assert hub.ranges() == []
    assert left(target) == []


def test_room_for_all_files_is_asked_for_before_the_first(hub, target, capsys):
    hub.stated_size = 10**18
    error_text = failing(hub, capsys, "previewer", "stage_a")
    assert error_text.startswith("models has ")
    assert error_text.endswith(
        " free, but 2000000000 GB are still to come in 2 files; free some space, fetch fewer, or choose another folder "
        "(--to)."
    )
    assert hub.ranges() == []
    assert left(target) == []


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x", "http://", "//", "\x7f"]
)
def test_bytes_from_an_address_of_another_kind(hub, target, capsys, location):
    hub.location = location
    error_text = failing(hub, capsys)
    assert error_text.startswith("stage_a did not come from ") or "The hub" in error_text
    assert error_text.isprintable()
    assert left(target) == []


def test_redirects_for_ever(hub, target, capsys):
    hub.location = f"{hub.url}/{REPO}/resolve/{COMMIT}/stage_a.safetensors"
    assert failing(hub, capsys).startswith("stage_a did not come from ")
    assert left(target) == []


def test_a_range_that_is_another(hub, target, capsys):
    """The server says that it sends the rest, of another whole, and begins elsewhere."""
    cut_short(hub, capsys)
    hub.stated_range, hub.storage[SHA256] = 7, b"other" + CONTENT
    assert "stage_a arrived damaged" in failing(hub, capsys)
    assert left(target) == []


@pytest.mark.parametrize("status", [416, 500, 404, 206])
def test_bytes_with_another_status(hub, target, capsys, status):
    cut_short(hub, capsys)
    hub.storage_status = status
    before = left(target)
    if status == 206:
        assert fetch(hub) == 0
        return
    error_text = failing(hub, capsys)
    assert error_text.endswith("what has arrived is kept, and the same command goes on from there.")
    assert left(target) == before
    hub.storage_status = None
    assert fetch(hub) == 0
    assert target.read_bytes() == CONTENT


@pytest.mark.nightly
def test_four_fetches_of_one_file_at_once(hub, tmp_path, target):
    """As in four containers, each is process 1: one fetches, the others say so or find the file whole."""
    processes = [start("fetch", "stage_a", "--endpoint", hub.url, cwd=tmp_path) for _ in range(4)]
    ended = [process.communicate() for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, (_, err) in zip(codes, ended, strict=True):
        assert code == 0 or "is being fetched by another process; wait until it is done." in err
    assert target.read_bytes() == CONTENT
    assert left(target) == [target.name]
