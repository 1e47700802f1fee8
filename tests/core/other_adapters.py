"""What other programs' adapters hold, and the weights that those programs make of them."""

import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save_file
from torch import Tensor

from cascade_nodes.cascade_core.adapters import Adapter, parse_adapter, read_adapter
from cascade_nodes.cascade_core.adapters.names import parameter_name
from cascade_nodes.tests.golden_weights import hashed_tensor

ARCHIVE = Path(__file__).parents[1] / "data" / "other_adapters.tar.xz"


class Case(NamedTuple):
    """file: its tensors; changed: the parameters, by what changes are called, after the other program changed them"""

    file: dict[str, Tensor]
    changed: dict[str, Tensor]


@cache
def _contents() -> tuple[dict[str, Tensor], Any]:
    with tarfile.open(ARCHIVE) as archive:
        files = [archive.extractfile(name) for name in ("changes.safetensors", "changes.json")]
        tensors, names = (file.read() for file in files if file is not None)
    return load(tensors), json.loads(names)


def cases() -> dict[str, Case]:
    """{program and what it trained: its file and what it makes of the hashed weights}"""
    found: dict[str, Case] = {}
    for key, tensor in _contents()[0].items():
        name, part, rest = key.split("|")
        case = found.setdefault(name, Case({}, {}))
        (case.file if part == "file" else case.changed)[rest] = tensor
    return dict(sorted(found.items()))


def configuration(name: str) -> dict[str, Any] | None:
    """PEFT's adapter_config.json of a case."""
    return _contents()[1]["configurations"].get(name.removeprefix("PEFT "))


def refused() -> list[tuple[str, dict[str, list[int]]]]:
    """(algorithm, shapes by key) of files that are not read."""
    return [(algorithm, shapes) for algorithm, shapes in _contents()[1]["refused"]]


def read(name: str, folder: Path) -> Adapter:
    """A case's adapter; PEFT's from a folder as it writes it."""
    case, config = cases()[name], configuration(name)
    if config is None or not name.startswith("PEFT"):
        return parse_adapter(case.file, {}, f"{name}.safetensors")
    save_file(case.file, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(folder / "adapter_model.safetensors")


def before(target: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter that the other program changed."""
    return hashed_tensor(parameter_name(target), shape)
