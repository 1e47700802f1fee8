"""`cascade models`: lists the published files that are present, under any name, and what each workflow lacks.

A file is recognised by the names and shapes of its tensors; only headers are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..cascade_core.checkpoints import describe, identify, parts_in, read_header
from ..cascade_core.checkpoints.layouts import ALL_IN_ONE
from ..cascade_core.errors import CascadeError, escaped
from ..cascade_core.text.clip import infer_text_config, infer_vision_config
from ..nodes.hosts import roles
from ..nodes.hosts.headless import folders
from .catalogue import FILES, WORKFLOWS, PublishedFile, Workflow, in_words
from .fetch import partial_files, target_path

# CLIP's encoders: their roles, and the functions that infer their configurations.
_ENCODERS = {"text": ("text_encoder", infer_text_config), "vision": ("vision", infer_vision_config)}


_ARTICLES = {"text_encoder": "a", "vision": "an"}


class FileNetwork(NamedTuple):
    """Network in a file: its role, its configuration, the safetensors dtype of most of its bytes."""

    role: str
    config: Mapping[str, Any]
    precision: str

    def is_published(self, file: PublishedFile) -> bool:
        """Whether this is the network of a published file, in an equivalent precision."""
        return (
            self.role == file.role
            and all(self.config.get(name) == value for name, value in file.traits.items())
            and (not file.precisions or self.precision in file.precisions)
        )


@dataclass
class Survey:
    """Contents of the model folders.

    files         {name in the catalogue: paths} of recognised files, in the order in which loaders look
    unrecognised  {path: description} of all other files
    """

    roots: list[Path]
    files: dict[str, list[Path]] = field(default_factory=dict)
    unrecognised: dict[Path, str] = field(default_factory=dict)

    def lacking(self, workflow: Workflow) -> list[str]:
        """Files to fetch for a workflow: for each unmet need the first one that serves it."""
        return [need[0] for need in workflow.needs if not any(name in self.files for name in need)]

    @cached_property
    def ready(self) -> list[str]:
        """Names of the workflows that lack nothing."""
        return [name for name, workflow in WORKFLOWS.items() if not self.lacking(workflow)]


def new_files_root() -> Path:
    """`models` folder that files are fetched into."""
    return folders.roots()[0]


def missing_files(names: Iterable[str], root: Path) -> list[str]:
    """Resolves names of files and workflows into names of files: those, and the ones that the workflows lack."""
    survey: Survey | None = None
    files: dict[str, None] = {}
    for name in names:
        if name in WORKFLOWS:
            survey = survey or take_survey(root)
            files |= dict.fromkeys(survey.lacking(WORKFLOWS[name]))
        else:
            files[name] = None
    return list(files)


def take_survey(*further: Path) -> Survey:
    """Searches the folders of every role, under the usual roots and `further` ones."""
    survey = Survey(list(dict.fromkeys([*folders.roots(), *further])))
    contents: dict[Path, list[FileNetwork]] = {}
    for role, categories in roles.FOLDERS.items():
        for path in _files_in(survey.roots, categories) if role not in ("lora", "embedding") else ():
            if path not in contents:
                contents[path] = _contents(path, survey.unrecognised)
            loaded_whole = role == "checkpoint" and _is_loaded_whole(path, contents[path])
            for file in FILES.values():
                known_paths = survey.files.get(file.name, [])
                if (
                    (file.role == role or loaded_whole)
                    and path not in known_paths
                    and holds_published(contents[path], file)
                ):
                    survey.files[file.name] = [*known_paths, path]
    recognised = {path for paths in survey.files.values() for path in paths}
    for path in contents.keys() - recognised:
        survey.unrecognised.setdefault(path, _describe(path, contents[path]))
    return survey


def holds_published(contents: list[FileNetwork], file: PublishedFile) -> bool:
    """Whether one of a file's networks is that of a published file."""
    return any(content.is_published(file) for content in contents)


def _is_loaded_whole(path: Path, contents: list[FileNetwork]) -> bool:
    """Whether the checkpoint loader loads the whole file: an all-in-one file, or one of a diffusers folder."""
    all_in_one = any(content.role == "checkpoint" for content in contents)
    return all_in_one or (path.parent.parent / "model_index.json").is_file()


def _files_in(roots: Iterable[Path], categories: Iterable[str]) -> list[Path]:
    places = [
        root / subfolder
        for category in categories
        for root in roots
        for subfolder in roles.subfolders(category)
    ]
    return [place / name for place in places for name in roles.names_in(place, "")]


def _contents(path: Path, unrecognised: dict[Path, str]) -> list[FileNetwork]:
    """Networks of a file, in any layout; without any, writes the reason into `unrecognised`."""
    try:
        return networks_of(path)
    except CascadeError as error:
        unrecognised[path] = str(error)
        return []


def networks_of(path: Path) -> list[FileNetwork]:
    """Networks of a file, in any layout, and the file as a checkpoint; only its header is read.

    Raises CascadeError for a file without any, which names what it is instead, or for one that cannot be read.
    """
    tensors, metadata, dtypes = read_header(path)
    precision = _precision(tensors, dtypes)
    layouts = parts_in(tensors)
    if not layouts:
        identify(path, tensors, metadata)  # raises CascadeError that names the file's kind
    # A config in the metadata belongs to the only network of its file.
    network_metadata = metadata if len(layouts) == 1 else {}
    contents = []
    for part, layout in layouts.items():
        role, config = _inferred(path, part, layout.to_published(tensors), network_metadata)
        contents.append(FileNetwork(role, config, precision))
        if layout.name == ALL_IN_ONE and role in ("stage_c", "stage_b"):
            contents.append(FileNetwork("checkpoint", {**config, "holds": role}, precision))
    return contents


def _inferred(
    path: Path, part: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    if part not in _ENCODERS:
        return identify(path, tensors, metadata)
    role, infer = _ENCODERS[part]
    return role, infer({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def _precision(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> str:
    """The dtype of most bytes, in safetensors' words."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes[dtypes[name]] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "none"


def _describe(path: Path, contents: list[FileNetwork]) -> str:
    for file in FILES.values():
        if holds_published(contents, file):
            return f"{path.name} is {file.description}, but its loader looks in {file.folder}; move it there."
    networks = [content for content in contents if content.role != "checkpoint"]
    return f"{' and '.join(describe_network(path, content) for content in networks)}."


def describe_network(path: Path, content: FileNetwork) -> str:
    """Describes a network of a file, such as "x.safetensors is a Stage C checkpoint (width 1536)"."""
    if content.role in _ARTICLES:
        network = f"{_ARTICLES[content.role]} {roles.ROLE_WORDS[content.role]}"
        return f"{path.name} is {network} (width {content.config['hidden_size']})"
    return describe(path, content.role, content.config)


def list_models(as_json: bool = False) -> str:
    """Lists workflows, published files and other files as text or JSON."""
    survey = take_survey()
    return json.dumps(_as_data(survey), indent=2) if as_json else _as_text(survey)


def _has_demo() -> bool:
    return all(roles.demo_file(role) for role in roles.DEMO_NAMES)


def _arrived(file: PublishedFile) -> int:
    """Bytes left by an interrupted transfer."""
    partials = partial_files(target_path(file, new_files_root()))
    return max((partial.stat().st_size for partial in partials), default=0)


def _as_data(survey: Survey) -> dict[str, Any]:
    files = {
        name: {
            "what": file.description,
            "size": file.size,
            "source": f"https://huggingface.co/{file.repo}/blob/main/{file.path}",
            "licence": {"name": file.licence.name, "url": file.licence.url},
            "fetched_to": str(target_path(file, new_files_root())),
            "arrived": _arrived(file),
            "found": [str(path) for path in survey.files.get(name, [])],
        }
        for name, file in FILES.items()
    }
    workflows = {
        name: {
            "what": workflow.description,
            "ready": name in survey.ready,
            "needs": [list(need) for need in workflow.needs],
            "missing": survey.lacking(workflow),
            "missing_size": sum(FILES[file].size for file in survey.lacking(workflow)),
        }
        for name, workflow in WORKFLOWS.items()
    }
    unrecognised = {str(path): description for path, description in survey.unrecognised.items()}
    return {
        "roots": [str(root) for root in survey.roots],
        "demo": _has_demo(),
        "files": files,
        "workflows": workflows,
        "others": unrecognised,
    }


def _as_text(survey: Survey) -> str:
    sections = {
        "Workflows": [_demo_line(), *(_workflow_line(workflow, survey) for workflow in WORKFLOWS.values())],
        "Published files": [line for file in FILES.values() for line in _file_lines(file, survey)],
        "Other files": [
            f"{path}: {description}" for path, description in sorted(survey.unrecognised.items())
        ],
        "Looked in": [str(root) for root in survey.roots],
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {escaped(line)}" for line in lines)])
        for title, lines in sections.items()
        if lines
    )


_WIDTH = max(map(len, [*FILES, *WORKFLOWS]))


def _demo_line() -> str:
    state = "ready" if _has_demo() else "its files in demo/weights are missing; install the project again"
    return f"{'demo':{_WIDTH}}  text to image of a toy world, comes with the project: {state}"


def _workflow_line(workflow: Workflow, survey: Survey) -> str:
    names = survey.lacking(workflow)
    size = in_words(sum(FILES[name].size for name in names))
    state = f"missing {', '.join(names)} ({size})" if names else "ready"
    return f"{workflow.name:{_WIDTH}}  {workflow.description}: {state}"


def _file_lines(file: PublishedFile, survey: Survey) -> list[str]:
    head = f"{file.name:{_WIDTH}}  {in_words(file.size):>7}  "
    paths = survey.files.get(file.name, [])
    if paths:
        return [f"{head if index == 0 else ' ' * len(head)}{path}" for index, path in enumerate(paths)]
    arrived = _arrived(file)
    hint = f"; {in_words(arrived)} have arrived, `cascade fetch {file.name}` goes on" if arrived else ""
    return [f"{head}missing, {file.description} ({file.repo}/{file.path}{hint})"]
