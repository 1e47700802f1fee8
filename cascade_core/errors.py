"""Exceptions that end a run: an error that the user can mend, or the user's own interruption."""

import reprlib
import unicodedata


class CascadeError(ValueError):
    """An error that the user can mend: one sentence that says what, where, what was expected and what to do.

    Lone surrogates, which a file name may hold, are escaped: they cannot be written to a log, and ComfyUI's thread
    that runs prompts dies when it tries.
    """

    def __init__(self, sentence: str = ""):
        super().__init__(sentence.encode("utf-8", "backslashreplace").decode())


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop. Not an error: let it pass."""


def quoted(value: object, limit: int = 80) -> str:
    """A value for a message, as Python writes it, cut to about `limit` characters.

    Time and memory are bounded too: only the beginning is read of a list that holds itself a thousand times, or of a
    text of a gigabyte. Control characters are escaped, so that no value can control a terminal.
    """
    short = _Short()
    short.maxlevel, short.maxstring, short.maxother = 3, limit + 3, limit
    text = short.repr(f"{value[:limit]}…" if isinstance(value, str) and len(value) > limit else value)
    return text if len(text) <= limit + 3 else f"{text[:limit]}…"


def printable(text: str, limit: int = 200) -> str:
    """A name, or another program's message, unchanged if it is printable and short, else `quoted`."""
    return text if text.isprintable() and len(text) <= limit else quoted(text, limit)


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number of things, for a message. plural: the ending of more than one."""
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def escaped(line: str) -> str:
    """A line for a terminal: control characters are written as Python's escapes."""
    if line.isprintable():
        return line
    shown = (
        char if char.isprintable() or unicodedata.category(char) == "Zs" else repr(char)[1:-1]
        for char in line
    )
    return "".join(shown)


def on_one_line(error: BaseException) -> str:
    """Kind and text of an error that is not a sentence for users."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def excerpt(text: str, limit: int = 2000) -> str:
    """Another program's text as part of a message: cut, and `escaped`."""
    return escaped(text if len(text) <= limit else f"{text[:limit]}…")


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of thousands of digits.
        return repr(x) if x.bit_length() < 400 else f"<a number of {x.bit_length()} bits>"
