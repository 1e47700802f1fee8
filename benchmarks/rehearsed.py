"""The process watched by benchmarks/rehearsal.py: runs a notebook's cells on a card that poses as a smaller one.

    python rehearsed.py cells SETTINGS          the cells of the settings' notebook, in order
    python rehearsed.py command SETTINGS …      `cascade …`, as a cell runs it

Writes a line of JSON to standard output before and after every cell; the cells' own output goes to standard error.
Only the project's view of the machine is changed.
"""

import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cascade_nodes.cascade_core.placement import pinned

T4 = {"name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40}
NETWORK = re.compile(r"(?:^|&&|\|\||;|\()\s*(?:pip|git|wget|curl|apt-get|cascade fetch)\b")
ADDRESS = "the address of the repository"


@dataclass(frozen=True)
class Settings:
    """Arguments of the process.

    card     bytes of the card, including its context and all other programs; None: no card
    held     bytes already used by other programs, which the smaller card would not have
    main     bytes of main memory
    others   processes whose main memory counts too
    published  whether the notebook's switch is on
    """

    notebook: str
    card: int | None
    held: int
    main: int
    published: bool
    others: tuple[int, ...] = ()


def main_memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of main memory of a process, by kind: anonymous (what it pinned itself included), shared and of files.

    Anonymous and shared memory of several processes is divided among them; file pages count fully for each, so that
    other programs that map the same file change nothing. Empty if the process has ended.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        text += Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    names = {"anonymous": "Pss_Anon", "shared": "Pss_Shmem", "files": "RssFile"}
    return {kind: 1024 * int(found.get(name, found.get("Pss", 0))) for kind, name in names.items()}


def taken(pids: Iterable[int | str]) -> int:
    """Bytes of main memory taken by processes, without pages of mapped files; cheap enough for frequent calls."""
    found: list[str] = []
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found += re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * sum(map(int, found))


# What the project sees of the machine


class SmallerCard:
    """A card's properties, with a T4's where they differ."""

    def __init__(self, properties: Any, size: int):
        self._properties = properties
        self.__dict__ |= T4 | {"total_memory": size}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)


def limit_card(settings: Settings) -> None:
    """Makes the card report `settings.card` bytes, and PyTorch allocate no more."""
    assert settings.card is not None
    size, cuda = settings.card, torch.cuda
    cuda.init()
    real_info, real_properties = cuda.mem_get_info, cuda.get_device_properties
    real_share = cuda.set_per_process_memory_fraction
    share = 1.0  # of the smaller card, as the project set it

    def taken_bytes() -> int:
        free, total = real_info()
        return total - free - settings.held

    def set_share(fraction: float, device: Any = None) -> None:
        nonlocal share
        share = fraction
        # The context grows with each loaded kernel, and PyTorch gets the rest.
        context = taken_bytes() - cuda.memory_reserved()
        real_share(max(min(fraction * size, size - context), 0) / real_info()[1])

    def mem_get_info(*arguments: Any, **options: Any) -> tuple[int, int]:
        return max(size - taken_bytes(), 0), size

    set_share(share)

    def get_device_properties(*arguments: Any, **options: Any) -> Any:
        return SmallerCard(real_properties(*arguments, **options), size)

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        properties = real_properties(device)
        return properties.major, properties.minor

    replaced: dict[str, Callable[..., Any]] = {
        "get_device_capability": get_device_capability,  # the real card's, for which Triton compiles
        "mem_get_info": mem_get_info,
        "get_device_properties": get_device_properties,
        "get_per_process_memory_fraction": lambda *_: share,
        "set_per_process_memory_fraction": set_share,
    }
    for name, function in replaced.items():
        for module in (cuda, cuda.memory):
            if hasattr(module, name):
                setattr(module, name, function)
    # Attention kernels that Turing lacks.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def limit_main_memory(settings: Settings) -> None:
    """Makes placement pin no more memory than the rehearsed machine would report."""

    def available_bytes() -> int:
        return max(settings.main - taken(("self", *settings.others)), 0)

    pinned.available_bytes = available_bytes


def limit(settings: Settings) -> None:
    if settings.card is not None:
        limit_card(settings)
    limit_main_memory(settings)


# The notebook


class Cells:
    """A notebook's code cells as Colab runs them.

    skipped: lines of the current cell that need the network
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        notebook = json.loads(Path(settings.notebook).read_text(encoding="utf-8"))
        self.cells = [(cell, "".join(cell["source"])) for cell in notebook["cells"]]
        self.skipped: list[str] = []
        self.pictures: list[tuple[int, int]] = []
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "run_line": self.run_line,
        }

    def run(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._stand_in("google.colab")
        self._stand_in("IPython.display", display=self.display)
        title = ""
        for index, (cell, source) in enumerate(self.cells):
            if cell["cell_type"] == "markdown":
                title = source.splitlines()[0].lstrip("# ").partition(" · ")[0] if source else title
            if cell["cell_type"] != "code":
                continue
            self.skipped, self.pictures = [], []
            about = {"cell": index, "name": cell.get("id", ""), "title": title}
            tell({"begun": about})
            seconds, peaks = self._measured(as_python(self._switched(source)), f"cell {index}")
            tell(
                {
                    "ended": about
                    | {
                        "seconds": seconds,
                        "skipped": self.skipped,
                        "pictures": self.pictures,
                        **peaks,
                    }
                }
            )

    def _measured(self, code: str, name: str) -> tuple[float, dict[str, int]]:
        cuda = self.settings.card is not None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        exec(compile(code, name, "exec"), self.names)  # noqa: S102 (the notebook is this project's own)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        if not cuda:
            return seconds, {}
        host = getattr(torch.cuda, "host_memory_stats", dict)()
        return seconds, {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "pinned_by_torch": host.get("allocated_bytes.peak", host.get("allocated_bytes.all.peak", 0)),
        }

    def _switched(self, source: str) -> str:
        """The cell with the switch set as a user of Colab would."""
        source = source.replace('REPOSITORY = ""', f"REPOSITORY = {ADDRESS!r}")
        return source.replace("REAL = False", "REAL = True") if self.settings.published else source

    def run_line(self, line: str) -> None:
        """Runs a shell line: `cascade` in a process with the same limits; lines that need the network are skipped."""
        if NETWORK.search(line):
            self.skipped.append(line)
            return
        words = shlex.split(line)
        if not words or words[0] != "cascade":
            raise ValueError(
                f"The notebook runs {line!r}; a rehearsal knows `cascade` and what needs the network."
            )
        settings = asdict(self.settings) | {"others": (*self.settings.others, os.getpid())}
        command = [sys.executable, __file__, "command", json.dumps(settings), *words[1:]]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def display(self, shown: Any) -> None:
        size = getattr(shown, "size", None)
        if isinstance(size, tuple):
            self.pictures.append((int(size[0]), int(size[1])))

    @staticmethod
    def _stand_in(name: str, **contents: Any) -> None:
        """Stands in for a module that exists only in Colab."""
        parent, _, child = name.partition(".")
        package, module = ModuleType(parent), ModuleType(name)
        module.__dict__.update(contents)
        for each in (package, module):
            each.__spec__ = ModuleSpec(each.__name__, None)  # other packages check whether it exists
            sys.modules.setdefault(each.__name__, each)
        setattr(sys.modules[parent], child, sys.modules[name])


def as_python(source: str) -> str:
    """A cell as plain Python, in which `run_line` runs its shell lines, with {names} filled in."""
    lines = []
    for line in source.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        text = line.strip()
        if text.startswith("!"):
            text = f"run_line(f{text[1:]!r})"
        elif text.startswith("%"):
            raise ValueError(f"The notebook has the magic {text!r}, which a rehearsal does not know.")
        else:
            text = line[len(indent) :]
        lines.append(indent + text)
    return "\n".join(lines) + "\n"


def main() -> None:
    what, text, *words = sys.argv[1:]
    loaded = json.loads(text)
    settings = Settings(**{**loaded, "others": tuple(loaded["others"])})
    limit(settings)
    if what == "command":
        sys.argv[1:] = words
        runpy.run_module("cascade_nodes.headless", run_name="__main__", alter_sys=True)
        return
    told = sys.stdout

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=told, flush=True)

    with redirect_stdout(io.TextIOWrapper(sys.stderr.buffer, write_through=True)):
        Cells(settings).run(tell)


if __name__ == "__main__":
    main()
