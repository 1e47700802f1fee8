"""What a case may end in: it works, or clean sentences that the user can act on."""

from __future__ import annotations

import io
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless.cli import main

LONGEST_SENTENCE = 2000  # characters
PHRASES = ("please report this", "failed with", "Traceback (most recent call last)", "ran out of memory")


@dataclass(frozen=True)
class Outcome:
    """message: what the user was told, None if the case works; fault: what must not happen, None if all is well"""

    message: str | None = None
    fault: str | None = None


def judge(action: Callable[[], None]) -> Outcome:
    """Runs an action and judges how it ends; its own assertions, such as that no file is lost, are faults too."""
    try:
        action()
    except CascadeError as error:
        return Outcome(str(error), flaw(str(error)))
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return Outcome(fault=brief(error))
    return Outcome()


def flaw(message: str) -> str | None:
    """What is wrong with an error's text of one sentence a line, or None."""
    lines = message.split("\n")
    if not all(line.strip() for line in lines):
        return "an empty line in the message"
    for line in lines:
        if len(line) > LONGEST_SENTENCE:
            return f"a sentence of {len(line)} characters"
        wrong = next((c for c in line if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
        if wrong is not None:
            return f"the raw character {wrong!r} in the message"
        phrase = next((phrase for phrase in PHRASES if phrase in line), None)
        if phrase is not None:
            return f"{phrase!r} in the message"
    return None


def brief(error: BaseException) -> str:
    """An exception's type, text and innermost places of ours, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]]
    text = " ".join(ascii(str(error))[1:-1].split())
    return f"{type(error).__name__}: {text[:300]} ({' > '.join(places)})"


def command(*arguments: str) -> str:
    """Runs `cascade ARGUMENTS` in this process and returns its standard output; its errors as a CascadeError."""
    told, said = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(said):
        try:
            status = main(arguments)
        except SystemExit:  # of argparse: a wrong command line, told with its usage
            raise CascadeError(said.getvalue().strip().splitlines()[-1]) from None
    errors = [
        line.removeprefix("error: ") for line in said.getvalue().split("\n") if line.startswith("error: ")
    ]
    assert (status != 0) == bool(errors), f"status {status}, but said {said.getvalue()[-500:]!r}"
    if errors:
        raise CascadeError("\n".join(errors))
    return told.getvalue()


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of the last change)} of all files below a folder, to see what a case has changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found
