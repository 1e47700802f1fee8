"""Safetensors files, read by mapping and written whole or not at all."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CascadeError, printable
from ..reading import open_regular
from ..writing import check_file, replacing

# safetensors' names of dtypes, in the order in which it writes their tensors: the widest first, so all are aligned.
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The dtypes that a network's weights may have in a file.
FLOATING = tuple(dtype for dtype in _DTYPES.values() if dtype.is_floating_point)
# A published file's header takes less than a megabyte, a LoRA's with its trainer's notes a few. The format allows
# 100 MB, which would take gigabytes to read.
MAX_HEADER = 25_000_000
MAX_NAME = 1000  # characters of a tensor's name; names are compared with many patterns

# Other kinds of files that users often have in place of a safetensors file, by their first bytes.
_PICKLE = (
    "is a pickle (.ckpt, .pt), which can run code when opened, and only safetensors files are loaded; convert it on a "
    "machine you can spare"
)
_FOREIGN = (
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    (
        (b"version https://git-lfs",),
        "is Git LFS's pointer in place of the file; run `git lfs pull`, or download the file itself",
    ),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page in place of the file; download the file again"),
    (
        (b"GGUF",),
        "is a GGUF file, a form that no program has for Stable Cascade; choose the network's safetensors file",
    ),
    ((b"{",), "is a JSON file; choose the safetensors file that it belongs to"),
    (
        (b"PK", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
        "is an archive; unpack it, and choose the safetensors file in it",
    ),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"), "is a picture; choose the network's safetensors file"),
)
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
# Further kinds, by the extension, where the first bytes are not characteristic.
_FOREIGN_SUFFIXES = {
    ".onnx": "is an ONNX file, which is not read; choose the network's safetensors file",
    **dict.fromkeys(_PICKLE_SUFFIXES, _PICKLE),
    ".gguf": _FOREIGN[3][1],
}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. The tensors are views of the mapped file, read as they are used.

    Raises CascadeError for a missing, unreadable, truncated, damaged or foreign file. A pickle is never
    unpickled.
    """
    with _refusals(Path(path)), safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Checks a file's header first; turns the parser's exceptions inside the block into a CascadeError."""
    try:
        _check_header(path)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CascadeError(f"{path} cannot be read ({reason}); make it readable or choose another.") from None
    except SafetensorError as error:
        reason = printable(str(error).removeprefix("Error while deserializing header: "))
        raise CascadeError(f"{path} is a damaged safetensors file ({reason}); download it again.") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The table in a JSON file beside weights, such as their config or an index of shards.

    Raises CascadeError where there is none, or one of more than MAX_HEADER bytes.
    """
    text = read_text(path)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise CascadeError(f"{path} is not JSON with a table of names and values; download it again.")
    return table


def read_text(path: str | Path) -> str:
    """The contents of a text file beside weights, such as a vocabulary.

    Raises CascadeError for more than MAX_HEADER bytes, for a path that is not a file, and for bytes that are not UTF-8.
    """
    try:
        with open_regular(path) as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        reason = error.strerror or error
        raise CascadeError(
            f"{path} cannot be read ({reason}); make it readable, or download it again."
        ) from None
    if len(text) > MAX_HEADER:
        raise CascadeError(f"{path} has more than the {MAX_HEADER} bytes that are read; download it again.")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        raise CascadeError(f"{path} is not text in UTF-8; download it again.") from None


class Header(NamedTuple):
    """A file's contents without values.  tensors: on the meta device; dtypes: in safetensors' words, by name"""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    dtypes: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The names, shapes and dtypes of a file's tensors; nothing else of it is read or mapped.

    Raises CascadeError as `read_safetensors` does.
    """
    with _refusals(Path(path)), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    dtypes = {name: entry.get_dtype() for name, entry in slices.items()}
    tensors = {
        name: torch.empty(entry.get_shape(), dtype=_DTYPES.get(dtypes[name], torch.uint8), device="meta")
        for name, entry in slices.items()
    }
    return Header(tensors, metadata, dtypes)


def _check_header(path: Path) -> None:
    """Raises CascadeError, in a helpful sentence, for a file that the parser would refuse in a terse one."""
    if not path.exists():
        raise CascadeError(f"{path} does not exist; expected a safetensors file there.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not an ordinary file"
        raise CascadeError(f"{path} is {kind}, but a safetensors file is expected; give the file itself.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(path, file, size)
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unambiguous)
        except (ValueError, RecursionError):
            raise CascadeError(
                f"{path} is not a safetensors file: its header is not JSON; choose another, or download it again."
            ) from None
    expected = 8 + length + _last_offset(header)
    if size < expected:
        raise CascadeError(f"{path} is truncated: {size} of {expected} bytes are there; download it again.")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of the header. Raises ValueError for duplicate names, of which readers would take different entries."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise SafetensorError("a name in its header stands twice")
    if any(len(name) > MAX_NAME for name in table):
        raise SafetensorError(f"a name in its header has more than {MAX_NAME} characters")
    return table


def _header_length(path: Path, file: BinaryIO, size: int) -> int:
    """The header's length in bytes; leaves the file at its start. Every header begins with a brace."""
    start = file.read(32)
    if start[8:9] != b"{":
        if start.startswith(b"PK") and _is_pickle(path, start + file.read(200)):
            raise CascadeError(f"{path} {_PICKLE}.")
        for beginnings, complaint in _FOREIGN:
            if start.startswith(beginnings):
                raise CascadeError(f"{path} {complaint}.")
        if start and path.suffix.lower() in _FOREIGN_SUFFIXES:
            raise CascadeError(f"{path} {_FOREIGN_SUFFIXES[path.suffix.lower()]}.")
        if len(start) < 9:
            raise CascadeError(
                f"{path} holds {size} bytes, which is not a safetensors file; download it again."
            )
        raise CascadeError(
            f"{path} is not a safetensors file: it begins with {start[:8]!r}; choose another, or download it "
            "again."
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise CascadeError(
            f"{path} is not a safetensors file: its header claims {length} bytes, but {MAX_HEADER} at most are "
            "allowed; download it again."
        )
    if length > size - 8:
        raise CascadeError(
            f"{path} is truncated: its header alone takes {length} bytes, but the file has {size}; download "
            "it again."
        )
    file.seek(8)
    return length


def _is_pickle(path: Path, start: bytes) -> bool:
    """Whether a zip archive is one of torch's: those begin with `data.pkl` in a folder."""
    return b"/data.pkl" in start or path.suffix.lower() in _PICKLE_SUFFIXES


def _last_offset(header: Any) -> int:
    """The end of the last tensor, in bytes from the end of the header; 0 for a header that the parser refuses."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return max((end for end in ends if isinstance(end, int)), default=0)
    except (AttributeError, IndexError, KeyError, TypeError):
        return 0


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    overwrite: bool = True,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a file atomically: under a temporary name beside `path`, renamed at the end.

    The same tensors and metadata give the same bytes, those of the safetensors library with its metadata sorted (it
    writes them in random order). One tensor at a time is copied. value: gives the values of a name, where `tensors`
    have only shapes and types. Raises CascadeError if that fails (no permission, disk full); a file that was at
    `path` is then unchanged.
    """
    path = Path(path)
    try:
        header, names = _layout(tensors, metadata)
        with replacing(path, overwrite) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name in names:
                tensor = tensors[name] if value is None else value(name)
                values = tensor.detach().cpu().contiguous()  # a copy of this tensor alone
                file.write(values.flatten().view(torch.uint8).numpy().data)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, getattr(error, "strerror", None) or error) from None


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """(header, names in the order of the data). Raises ValueError for a dtype that the format does not have."""
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values()} - {str(dtype) for dtype in _NAMES})
    if unknown:
        raise ValueError(f"the format has no {unknown[0]}")
    order = list(_NAMES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), names


def check_writable(path: str | Path) -> None:
    """Raises CascadeError unless a file can be written at `path`; called before the work whose result it will hold."""
    try:
        check_file(Path(path))
    except OSError as error:
        raise _cannot_write(path, error.strerror or error) from None


def _cannot_write(path: str | Path, reason: object) -> CascadeError:
    return CascadeError(
        f"{path} could not be written ({reason}), and nothing was changed there; free some space, or choose a folder "
        "that can be written to."
    )
