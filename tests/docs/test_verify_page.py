"""docs/verify.md has every option of the command, and the form for issues asks for its files."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FORM = ROOT / ".github" / "ISSUE_TEMPLATE" / "published_weights.yml"


def test_every_option_is_on_the_page():
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "cascade_nodes.headless", "verify", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    options = set(re.findall(r"--[a-z-]+", run.stdout)) - {"--help"}
    assert len(options) == 7
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", page, re.MULTILINE))


def test_the_form_for_issues():
    form = yaml.safe_load(FORM.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = {entry["id"]: entry for entry in form["body"] if "id" in entry}
    assert fields["report"]["attributes"]["render"] == "json"
    for name in ("README.md", "README.ja.md"):
        head = (ROOT / name).read_text(encoding="utf-8").split("\n## ")[0]
        assert "`cascade verify`" in head
        assert "docs/verify.md" in head
