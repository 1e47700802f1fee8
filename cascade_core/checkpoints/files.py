"""Safetensors files, read by mapping and written whole or not at all."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CascadeError

_MAX_HEADER = 100_000_000  # the format's own limit


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. The tensors are views of the mapped file: nothing is read until it is used.

    Raises CascadeError for a missing, truncated or foreign file; a pickle is never opened.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CascadeError(f"{path} is not a whole safetensors file ({error}); download it again.") from None


def _check_header(path: Path) -> None:
    """Says what is wrong with a file before the parser does, in words that help."""
    if not path.exists():
        raise CascadeError(f"{path} does not exist; expected a safetensors file there.")
    if path.is_dir():
        raise CascadeError(f"{path} is a folder, but a safetensors file is expected here.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise CascadeError(
                    f"{path} is a pickle (.ckpt, .pt), which can run code when opened; only safetensors files are "
                    "loaded. Convert it to safetensors on a machine you can spare."
                )
            if len(start) < 8:
                raise CascadeError(f"{path} holds {size} bytes and is no safetensors file; download it again.")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, _MAX_HEADER):
                what = "is truncated" if 0 < length < _MAX_HEADER else "is no safetensors file"
                raise CascadeError(f"{path} {what}: its header claims {length} bytes, the file has {size}; download it again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CascadeError(f"{path} cannot be read ({error.strerror}).") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CascadeError(f"{path} is no safetensors file (its header is not JSON); choose a .safetensors file.") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise CascadeError(f"{path} is truncated: {size} of {expected} bytes are there; download it again.")


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes under a temporary name beside `path`, then renames: a half file never has the final name."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CascadeError(f"{path} could not be written ({error}); nothing was changed there.") from None
    finally:
        partial.unlink(missing_ok=True)
