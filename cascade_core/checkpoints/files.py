"""Safetensors files, read by mapping and written whole or not at all."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CascadeError

# safetensors' names of what files of networks are made of.
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
}
_MAX_HEADER = 100_000_000  # the format's own limit

# What is often found in place of a safetensors file, by its first bytes.
_FOREIGN = (
    (
        (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "is a pickle (.ckpt, .pt), which can run code when opened, and only safetensors files are loaded; "
        "convert it on a machine you can spare",
    ),
    (
        (b"version https://git-lfs",),
        "is Git LFS's pointer in place of the file; run `git lfs pull`, or download the file itself",
    ),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page in place of the file; download the file again"),
)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. The tensors are views of the mapped file, read as they are used.

    Raises CascadeError for a missing, unreadable, truncated, damaged or foreign file. A pickle is never
    unpickled.
    """
    path = Path(path)
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or error
        raise CascadeError(f"{path} cannot be read ({reason}); make it readable or choose another.") from None
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CascadeError(f"{path} is a damaged safetensors file ({reason}); download it again.") from None


class Header(NamedTuple):
    """What a file holds, without its values.  tensors: on the meta device; dtypes: in safetensors' words, by name"""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    dtypes: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The names, shapes and dtypes of a file's tensors; nothing else of it is read or mapped.

    Raises CascadeError as `read_safetensors` does.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        read_safetensors(path)  # raises, naming what is wrong
        raise
    dtypes = {name: entry.get_dtype() for name, entry in slices.items()}
    tensors = {
        name: torch.empty(entry.get_shape(), dtype=_DTYPES.get(dtypes[name], torch.uint8), device="meta")
        for name, entry in slices.items()
    }
    return Header(tensors, metadata, dtypes)


def _check_header(path: Path) -> None:
    """Raises CascadeError with a helpful sentence for a file that the parser would refuse with a bare one."""
    if not path.exists():
        raise CascadeError(f"{path} does not exist; expected a safetensors file there.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise CascadeError(f"{path} is {kind}, but a safetensors file is expected; give the file itself.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(path, file, size)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CascadeError(
                f"{path} is no safetensors file: its header is no JSON; choose another, or download it again."
            ) from None
    expected = 8 + length + _last_offset(header)
    if size < expected:
        raise CascadeError(f"{path} is truncated: {size} of {expected} bytes are there; download it again.")


def _header_length(path: Path, file: BinaryIO, size: int) -> int:
    """The header's length in bytes; leaves the file at its start. Every header begins with a brace."""
    start = file.read(32)
    if start[8:9] != b"{":
        for beginnings, complaint in _FOREIGN:
            if start.startswith(beginnings):
                raise CascadeError(f"{path} {complaint}.")
        if len(start) < 9:
            raise CascadeError(f"{path} holds {size} bytes, which is no safetensors file; download it again.")
        raise CascadeError(
            f"{path} is no safetensors file: it begins with {start[:8]!r}; choose another, or download it "
            "again."
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > _MAX_HEADER:
        raise CascadeError(
            f"{path} is no safetensors file: its header claims {length} bytes, but {_MAX_HEADER} at most are "
            "allowed; download it again."
        )
    if length > size - 8:
        raise CascadeError(
            f"{path} is truncated: its header alone takes {length} bytes, but the file has {size}; download "
            "it again."
        )
    file.seek(8)
    return length


def _last_offset(header: Any) -> int:
    """The end of the last tensor, in bytes from the end of the header; 0 for a header that the parser refuses."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return max((end for end in ends if isinstance(end, int)), default=0)
    except (AttributeError, IndexError, KeyError, TypeError):
        return 0


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file atomically: under a temporary name beside `path`, renamed at the end.

    Raises CascadeError if that fails (no permission, disk full); a file that was at `path` is then unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # any new file's; some versions of safetensors make theirs private
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ")
        raise CascadeError(
            f"{path} could not be written ({reason}), and nothing was changed there; free some space, or "
            "choose a folder that can be written to."
        ) from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # its folder cannot be entered: then nothing was written there either
        return
