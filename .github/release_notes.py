"""Prints the changelog's section of a tag, such as v0.3.0; fails where the files do not state the same version.

python .github/release_notes.py v0.3.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str) -> str:
    """The section of CHANGELOG.md without its heading. Raises SystemExit with what is to be mended."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if tag != f"v{version}":
        raise SystemExit(f"The tag is {tag}, but pyproject.toml has the version {version}; tag v{version}.")
    if cited is None or cited[1] != version:
        raise SystemExit(f"CITATION.cff does not have the version {version}; write it there.")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(
        rf"^## {re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    if section is None:
        raise SystemExit(f"CHANGELOG.md has no section {version}; rename Unreleased.")
    return section[1].strip()


if __name__ == "__main__":
    print(release_notes(sys.argv[1]))
