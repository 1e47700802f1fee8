"""Typed YAML, read into frozen dataclasses: an unknown key or a value of another type is an error that names it."""

import dataclasses
import math
import types
import unicodedata
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import CascadeError, printable, quoted
from ..reading import encoding_of, open_regular

T = TypeVar("T")

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
MAX_BYTES = 1_000_000  # of a file


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a file's mapping, as plain values. Raises CascadeError for any other file, and for a repeated key."""
    return parse_yaml(read_text(path, "YAML"), str(path))


def read_text(path: Path, kind: str = "plain text") -> str:
    """Reads a settings file in UTF-8, or in UTF-16 with a byte order mark. kind: its name in messages."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CascadeError(
            f"{printable(str(path))} cannot be read ({error.strerror or error}); give a settings file in {kind}."
        ) from None
    _check_size(len(data), str(path))
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise CascadeError(
            f"{path} is not {kind} in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise CascadeError(
            f"{where} is larger than the {MAX_BYTES:,} bytes that settings may have; give another file."
        )


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Reads a text's mapping; an empty text is an empty mapping."""
    try:
        import yaml

        from .bounded_yaml import BoundedLoader
    except ImportError:
        raise CascadeError(
            "Training settings are read by PyYAML, which is not installed; run: pip install PyYAML"
        ) from None
    _check_size(len(text), where)
    try:
        value = BoundedLoader(text, where).get_single_data()
    except CascadeError:
        raise
    except (
        Exception
    ) as error:  # PyYAML lets other exceptions through, as for May 99, 5,000 digits or `!!bool maybe`
        known = isinstance(error, yaml.YAMLError | ValueError)
        reason = _reason_of(error) if known else "a value does not fit its tag"
        raise CascadeError(f"{where} is not YAML: {reason}; correct it.") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CascadeError(
            f"{where} holds {quoted(value)}, but settings are names with values, as `train: …`."
        )
    return value


def _reason_of(error: Exception) -> str:
    """What PyYAML found wrong, and where, on one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or mark is None:
        return printable(" ".join(str(error).split()), 400)
    if problem.startswith("but "):  # the second half of a sentence
        problem = f"{getattr(error, 'context', None)}, {problem}"
    return f"{printable(' '.join(problem.split()), 400)}, in line {mark.line + 1}, column {mark.column + 1}"


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Builds a dataclass from these values; other fields keep their defaults. where: the section, for messages."""
    if not isinstance(values, Mapping):
        raise CascadeError(f"{where} is {quoted(values)}, but names with values are expected there.")
    kinds = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise CascadeError(
                unknown_name(f"{where + ': ' if where else ''}{quoted(name)} is not a setting", name, fields)
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise CascadeError(f"{_joined(where, name)} is missing; it has no default.")
    arguments = {name: _value(kinds[name], value, _joined(where, name)) for name, value in values.items()}
    return cls(**arguments)


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def unknown_name(sentence: str, name: Any, names: Mapping[str, Any] | tuple) -> str:
    close = get_close_matches(str(name)[:100], [str(each) for each in names], n=1)
    return (
        f"{sentence}; did you mean {close[0]}?"
        if close
        else f"{sentence}; known: {', '.join(map(str, names))}."
    )


def _value(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return _json_value(value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            name = value if isinstance(value, str) else ""
            raise CascadeError(unknown_name(f"{where} is {quoted(value)}", name, arguments))
        return value
    if origin is tuple:
        listed = value if isinstance(value, list) else [value]  # one value stands for a list of one
        return tuple(_value(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(listed))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where)
    if origin is dict:
        return build_mapping(value, where, arguments[1])
    return _plain(cast(type, kind), value, where)


def _one_of(kinds: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        try:
            return _value(kind, value, where)
        except CascadeError:
            if kind is others[-1]:
                raise
    raise AssertionError("a union has members")


def build_mapping(value: Any, where: str, kind: Any = Any) -> dict[str, Any]:
    """A mapping of names to values of a kind; Any: plain values, those of JSON types."""
    if not isinstance(value, Mapping):
        raise CascadeError(f"{where} is {quoted(value)}, but names with values are expected there.")
    return {
        _plain(str, name, where): _value(kind, each, f"{where}.{printable(name)}")
        for name, each in value.items()
    }


def _json_value(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return build_mapping(value, where)
    if isinstance(value, list | tuple):
        return [_json_value(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, str):
        return _plain(str, value, where)
    raise CascadeError(f"{where} is {quoted(value)}, but a plain number, text, list or mapping is expected.")


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is kind:
        if isinstance(value, str):
            _check_characters(value, where)
        return value
    raise CascadeError(f"{where} is {quoted(value)}, but {_WORDS.get(kind, kind.__name__)} is expected.")


def _check_characters(text: str, where: str) -> None:
    """Raises CascadeError for characters that neither a file name nor a caption has: NUL, escapes, lone surrogates."""
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r":
            raise CascadeError(
                f"{where} is {quoted(text)}, which holds the character {char!r}; leave it out."
            )
