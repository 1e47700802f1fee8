"""Typed YAML, read into frozen dataclasses: an unknown key or a value of another type is an error that names it."""

import dataclasses
import types
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import CascadeError

T = TypeVar("T")

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file's mapping, as plain values. Raises CascadeError for any other file, and for a repeated key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CascadeError(
            f"{path} cannot be read ({error.strerror or error}); give a settings file in YAML."
        ) from None
    except UnicodeDecodeError as error:
        raise CascadeError(f"{path} is no YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read a text's mapping; an empty text is an empty mapping."""
    try:
        import yaml
    except ImportError:
        raise CascadeError(
            "Training settings are read by PyYAML, which is not installed; run: pip install PyYAML"
        ) from None

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [self.construct_object(key) for key, _ in node.value]
            for i, (name, (key, _)) in enumerate(zip(names, node.value, strict=True)):
                if name in names[:i]:
                    raise CascadeError(f"{where}, line {key.start_mark.line + 1}: {name} is there twice.")
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise CascadeError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CascadeError(
            f"{where} holds {_quoted(value)}, but settings are names with values, as `train: …`."
        )
    return value


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass of these values; the other fields keep their defaults. where: the section, for messages."""
    if not isinstance(values, Mapping):
        raise CascadeError(f"{where} is {_quoted(values)}, but names with values are expected there.")
    kinds = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise CascadeError(
                _unknown_name(f"{where + ': ' if where else ''}{name!r} is not a setting", name, fields)
            )
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise CascadeError(f"{_joined(where, name)} is missing; it has no default.")
    arguments = {name: _value(kinds[name], value, _joined(where, name)) for name, value in values.items()}
    return cls(**arguments)


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _unknown_name(sentence: str, name: Any, names: Mapping[str, Any] | tuple) -> str:
    close = get_close_matches(str(name), [str(each) for each in names], n=1)
    return (
        f"{sentence}; did you mean {close[0]}?"
        if close
        else f"{sentence}; known: {', '.join(map(str, names))}."
    )


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise CascadeError(_unknown_name(f"{where} is {_quoted(value)}", value, arguments))
        return value
    if origin is tuple:
        listed = value if isinstance(value, list) else [value]  # one value stands for a list of one
        return tuple(_value(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(listed))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where)
    if kind is Any or origin is dict or kind is dict:
        return value
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


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 1e-4 for a text
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise CascadeError(f"{where} is {_quoted(value)}, but {_WORDS.get(kind, kind.__name__)} is expected.")


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
