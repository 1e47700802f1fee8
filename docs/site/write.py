"""Writes the documentation site's pages to build/pages and its settings beside them; the generator does the rest.

On GitHub pages link to each other and to the code by relative paths, out of docs/ as well. On the site the pages
outside docs/ are pages too, a link to a module of the core leads to its reference, which is made from docstrings, and
any other link to the repository. `REPOSITORY_URL` says where that is; without it such links are plain text.
"""

import ast
import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

ROOT = Path(__file__).parents[2]
# Pages outside docs/, and what they are called on the site; README.md is its first page.
OUTSIDE = {
    "README.md": "index.md",
    "README.ja.md": "ja/about.md",
    "docs/README.md": "contents.md",
    "docs/tasks/README.md": "tasks/index.md",
    "docs/ja/README.md": "ja/index.md",
    "docs/decisions/README.md": "decisions/index.md",
    "demo/README.md": "demo.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "tests/fuzz/README.md": "tests/fuzz.md",
    "tests/golden/README.md": "tests/golden.md",
}
LINK = re.compile(r"(?P<picture>!?)\[(?P<label>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z]+:|#")  # an address, or a heading of the same page
# Packages whose modules are read in their source: a page would show private parts of one algorithm.
WITHOUT_REFERENCE = ("cascade_core/engine/kernels/",)


def pages() -> dict[str, str]:
    """Every page: its path in the repository -> its path on the site."""
    within = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return {path: path.removeprefix("docs/") for path in sorted(within)} | OUTSIDE


def modules() -> dict[str, str]:
    """Every public module of the core: its path in the repository -> the page of its reference."""
    found = {}
    for path in sorted((ROOT / "cascade_core").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(WITHOUT_REFERENCE) and (path.name == "__init__.py" or path.name[0] != "_"):
            found[name] = "reference/" + name.replace("/__init__.py", "/index.md").replace(".py", ".md")
    return found


def links(page: str) -> Iterator[tuple[str, bool]]:
    """What a page's relative links lead to, as paths in the repository, and which of them are pictures."""
    for link in LINK.finditer(FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))):
        if not ELSEWHERE.match(link["target"]):
            yield resolve(page, link["target"].partition("#")[0]), bool(link["picture"])


def resolve(page: str, target: str) -> str:
    """A relative link of a page as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(target)))


def picture_place(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"images/{posixpath.basename(path)}"


def rewrite(page: str, repository: str = "") -> str:
    """A page's text with its links as the site has them."""
    places = pages() | modules()
    here = posixpath.dirname(places[page])

    def link(match: re.Match[str]) -> str:
        if match["fence"] or ELSEWHERE.match(match["target"]):
            return match[0]
        path, hash_, anchor = match["target"].partition("#")
        path = resolve(page, path)
        names = (path, f"{path}/README.md", f"{path}/__init__.py")
        place = next((places[name] for name in names if name in places), "")
        if match["picture"]:
            place = picture_place(path)
        if place:
            target = quote(posixpath.relpath(place, here)) + hash_ + anchor
        elif repository:
            target = f"{repository}/blob/main/{quote(path)}"
        else:
            return match["label"]
        return f"{match['picture']}[{match['label']}]({target})"

    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(f"(?P<fence>{FENCE.pattern})|{LINK.pattern}", link, text, flags=FENCE.flags)


def front_door() -> str:
    """The names that `cascade_core` offers itself, with links to where they are."""
    tree = ast.parse((ROOT / "cascade_core" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = sorted((alias.name, node.module) for node in imports for alias in node.names)
    lines = (f"- [`{name}`][cascade_core.{module}.{name}]\n" for name, module in names)
    return (
        "\nImported from here, or, where the pack is installed, from `cascade_nodes.cascade_core`:\n\n"
        + "".join(lines)
    )


def reference() -> str:
    """The nav of the reference, below the core's own page: a package's modules lie under its name."""
    lines = []
    for module, place in modules().items():
        *above, name = module.removesuffix("/__init__.py").removesuffix(".py").split("/")[1:] or [""]
        if not name:
            continue
        if module.endswith("__init__.py"):
            lines.append(f"{'    ' * len(above)}      - {name}:")
            above = [*above, name]
        title = "" if module.endswith("__init__.py") else f"{name}: "
        lines.append(f"{'    ' * len(above)}      - {title}{place}")
    return "".join(f"{line}\n" for line in lines)


def write(folder: Path, repository: str = "") -> None:
    """Writes every page, picture and setting as the generator reads them."""
    pages_folder = folder / "pages"
    shutil.rmtree(pages_folder, ignore_errors=True)
    texts = {place: rewrite(page, repository) for page, place in pages().items()}
    for module, place in modules().items():
        name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        texts[place] = f"# {name}\n\n::: {name}\n" + (front_door() if name == "cascade_core" else "")
    for place, text in texts.items():
        (pages_folder / place).parent.mkdir(parents=True, exist_ok=True)
        (pages_folder / place).write_text(text, encoding="utf-8")
    for picture in {path for page in pages() for path, is_picture in links(page) if is_picture}:
        (pages_folder / picture_place(picture)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / picture, pages_folder / picture_place(picture))
    shutil.copy(ROOT / "docs" / "site" / "site.css", pages_folder / "site.css")
    settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    (folder / "mkdocs.yml").write_text(settings + reference(), encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "build", os.environ.get("REPOSITORY_URL", ""))
