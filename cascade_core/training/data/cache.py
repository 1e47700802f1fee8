"""A cache of rows (latents, text states, …) in safetensors files that are written whole or not at all.

A cache is a folder with one subfolder for each network that encodes. A file in it holds some rows of one shape and
their keys; a key is the digest of what the row was made from, so that a row of a changed picture is never found.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checkpoints.files import read_safetensors, write_safetensors
from ...errors import CascadeError
from ...writing import check_folder

Key = bytes
KEY_BYTES = 16


def key_of(*parts: object) -> Key:
    return hashlib.blake2b(
        "\n".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=KEY_BYTES
    ).digest()


def fingerprint(network: nn.Module) -> str:
    """A digest of a network's weights, which alone determine what it computes."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name, value in network.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Cache:
    """Rows by key; tensors are views of mapped files, or lie in memory where there is no folder."""

    def __init__(self, folder: str | Path | None, fingerprint: str):
        self.folder = Path(folder).expanduser() / fingerprint if folder is not None else None
        self.rows: dict[Key, Tensor] = {}
        self._read_files: set[str] = set()
        if self.folder is not None and self.folder.is_dir():
            with suppress(OSError):
                # Removes temporary files of killed runs. An unwritable folder is reported by `add`.
                check_folder(self.folder)
            self.read()

    def read(self) -> None:
        """Reads rows that other processes have added to the folder."""
        if self.folder is not None:
            for path in sorted(self.folder.glob("*.safetensors")):
                if path.name not in self._read_files:
                    self._read_files.add(path.name)
                    self._read(path)

    def _read(self, path: Path) -> None:
        try:
            tensors, _ = read_safetensors(path)
            keys, rows = tensors["keys"], tensors["rows"]
        except (CascadeError, KeyError):  # a damaged file: its rows are encoded anew
            return
        if keys.dtype == torch.uint8 and keys.ndim == 2 and keys.shape == (*rows.shape[:1], KEY_BYTES):
            self.rows |= zip(map(bytes, keys.numpy()), rows.unbind(), strict=True)

    def keep(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Keeps a row only if it has this shape and dtype; a damaged one is dropped, and so encoded anew."""
        row = self.rows.get(key)
        if row is not None and (row.shape != shape or row.dtype != dtype):
            del self.rows[key]

    def __contains__(self, key: Key) -> bool:
        return key in self.rows

    def add(self, keys: Sequence[Key], rows: Tensor) -> None:
        """Adds rows of one shape; they are on disk when it returns."""
        rows = rows.detach().cpu().contiguous()
        if self.folder is not None:
            self._read_files.add(self.write(keys, rows))
        self.rows |= zip(keys, rows.unbind(), strict=True)

    def write(self, keys: Sequence[Key], rows: Tensor) -> str:
        """Writes rows of one shape to the folder, where `read` finds them; returns the file's name."""
        assert self.folder is not None
        key_bytes = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY_BYTES)
        name = f"{key_of(*keys).hex()}.safetensors"
        write_safetensors(self.folder / name, {"keys": key_bytes, "rows": rows}, {})
        return name

    def stack(self, keys: Iterable[Key]) -> Tensor:
        """The keys' rows as one tensor in memory."""
        return torch.stack([self.rows[key] for key in keys])
