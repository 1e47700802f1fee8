"""The documentation's site: every page in its nav, every link of a page leads to a page, a heading or a file."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from .test_links import anchors

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-docs.lock")

_spec = importlib.util.spec_from_file_location("write_site", ROOT / "docs" / "site" / "write.py")
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)


class Settings(yaml.SafeLoader):
    """Reads mkdocs.yml without the generator, whose tags name its own functions."""


Settings.add_multi_constructor("", lambda *_: None)


def entries(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [entry for value in values for entry in entries(value)]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    site.write(folder)
    return folder


def test_every_page_stands_in_the_nav_once(written):
    nav = yaml.load((written / "mkdocs.yml").read_text(encoding="utf-8"), Settings)["nav"]
    pages = sorted(path.relative_to(written / "pages").as_posix() for path in written.rglob("*.md"))
    assert sorted(entries(nav)) == pages
    assert "reference/cascade_core/run.md" in pages


def test_every_link_leads_somewhere(written):
    broken = []
    for page in (written / "pages").rglob("*.md"):
        if "reference" in page.parts:
            continue
        for link in site.LINK.finditer(site.FENCE.sub("", page.read_text(encoding="utf-8"))):
            path, _, anchor = link["target"].partition("#")
            target = page.parent / unquote(path) if path else page
            if not re.match(r"[a-z]+:", path) and (
                not target.is_file() or (anchor and anchor not in anchors(target))
            ):
                broken.append((page.relative_to(written).as_posix(), link["target"]))
    assert broken == []


def test_links_out_of_the_pages():
    """A link to a module leads to its reference; one to a file that is not a page, to the repository, or nowhere
    without one.
    """
    assert "(reference/cascade_core/training/run.md)" in site.rewrite("docs/architecture.md")
    assert "](../../tests" not in site.rewrite("docs/architecture.md")
    assert "](../pyproject.toml" not in site.rewrite("docs/architecture.md")
    assert "(https://host/us/blob/main/pyproject.toml)" in site.rewrite(
        "docs/architecture.md", "https://host/us"
    )


def test_what_lies_outside_is_there():
    missing = [
        (page, path) for page in site.pages() for path, _ in site.links(page) if not (ROOT / path).exists()
    ]
    assert missing == []


def test_a_package_has_one_version_in_all_locks():
    versions: dict[str, set[str]] = {}
    for lock in LOCKS:
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text("utf-8"), re.MULTILINE):
            versions.setdefault(name.lower().replace("_", "-"), set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}
    assert "zensical" in versions


@pytest.mark.nightly
def test_the_site_is_built(written, tmp_path):
    """The pinned generator from PyPI builds it strictly; its search finds docstrings, whose columns become lists."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    lock = ROOT / "requirements-docs.lock"
    subprocess.run([binaries / "pip", "install", "--quiet", "--requirement", lock], check=True)
    settings = written / "mkdocs.yml"
    text = settings.read_text(encoding="utf-8")
    text = text.replace("paths: [..]", f"paths: [{ROOT}]").replace("[../docs", f"[{ROOT}/docs")
    settings.write_text(text, encoding="utf-8")
    command = [binaries / "zensical", "build", "--strict", "--config-file", settings]
    build = subprocess.run(
        command, cwd=written, env={"PATH": str(binaries)}, capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stdout + build.stderr
    run = (written / "site" / "reference" / "cascade_core" / "run" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<li><code>batch_index</code>\s+which image", run)
    index = json.loads(next((written / "site").glob("search.json")).read_text(encoding="utf-8"))
    assert any("SamplingRun" in str(entry) for entry in index["items"])
