"""`cascade fetch`: downloads a published file from the hub into its folder, whole and verified or not at all.

The bytes go to a part file beside the final name. A transfer that ends early leaves the part, and the next one resumes
it; only a part whose size and sha256 match the hub's gets the final name. huggingface_hub requests the metadata and
transfers the bytes over HTTP; its cache, its xet transfer and its telemetry are not used.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..cascade_core.errors import CascadeError
from .catalogue import FILES, PublishedFile, in_words

if TYPE_CHECKING:
    from .progress import TransferProgress

try:
    import fcntl
except ImportError:  # Windows: there, two fetches of the same file are not kept apart
    fcntl = None

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_LARGER = 1.05  # times the catalogue's sizes, which are rounded
_RESUMABLE = "what has arrived is kept, and the same command goes on from there"


@dataclass(frozen=True)
class RemoteFile:
    """Size and sha256 that the hub states for a file, and the URL of that version."""

    url: str
    size: int
    sha256: str


def fetch(names: Iterable[str], root: Path, endpoint: str | None, progress: TransferProgress) -> list[Path]:
    """Downloads published files by their names in the catalogue where they are missing, and returns their paths.

    root: folder in place of ComfyUI's `models`; endpoint: another address of the hub, such as a mirror.
    Raises CascadeError at the first file that is not available; those before it stay.
    """
    files = [FILES[name] for name in dict.fromkeys(names)]
    if len(files) > 1:
        _check_room(files, root, endpoint)
    paths = []
    for index, file in enumerate(files, start=1):
        progress.node_started(index, len(files), file.name)
        paths.append(_fetch_file(file, root, endpoint, progress))
    return paths


def _check_room(files: Iterable[PublishedFile], root: Path, endpoint: str | None) -> None:
    """Raises CascadeError, before the first download, unless the disk has room for all remaining files."""
    missing = [file for file in files if not os.path.lexists(target_path(file, root))]
    remaining = 0
    for file in missing:
        arrived = max((part.stat().st_size for part in partial_files(target_path(file, root))), default=0)
        remaining += max(_look_up(file, endpoint).size - arrived, 0)
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if remaining > free:
        raise CascadeError(
            f"{root} has {in_words(free)} free, but {in_words(remaining)} are still to come in {len(missing)} files; "
            "free some space, fetch fewer, or choose another folder (--to)."
        )


def target_path(file: PublishedFile, root: Path) -> Path:
    """Path of a published file under a `models` folder."""
    return root / file.folder / file.saved_as


def partial_files(target: Path) -> list[Path]:
    """Part files of interrupted transfers of a file."""
    return sorted(target.parent.glob(f".{target.name}.*.part"))


def _fetch_file(file: PublishedFile, root: Path, endpoint: str | None, progress: TransferProgress) -> Path:
    target, begun = target_path(file, root), time.monotonic()
    remote = _look_up(file, endpoint)
    if os.path.lexists(target):
        progress.status(f"{progress.head}  comparing {target}")
        _check_same(target, file, remote)
        progress.file_kept(target)
        return target
    partial = target.with_name(f".{target.name}.{remote.sha256[:16]}.part")
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = _PartialFile(partial, progress.bytes_arrived, remote.size)
    with stream:
        stream.lock()
        try:
            stream.begin()
            _check_size(file, remote)
            _transfer(file, remote, stream)
            stream.close_on_windows()
            progress.status(f"{progress.head}  verifying")
            _verify(partial, file, remote)
            with _writing(target):
                stream.flush_to_disk()
                os.replace(partial, target)
        finally:
            if not stream.closed and stream.tell() == 0:
                stream.close_on_windows()
                partial.unlink(missing_ok=True)
    progress.file_arrived(target, time.monotonic() - begun)
    return target


class _Complete(Exception):  # noqa: N818 (not an error)
    """All expected bytes have arrived; further bytes from the server are not waited for."""


class _PartialFile(io.FileIO):
    """Part file that grows to the expected size, reports its size after each write, and raises _Complete at the end."""

    def __init__(self, path: Path, arrived: Callable[[int, int], None], size: int):
        super().__init__(path, "ab")
        self.path, self.arrived, self.size = path, arrived, size

    def lock(self) -> None:
        """Locks the file against another fetch until it is closed."""
        try:
            if fcntl is not None:
                fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # other errors: the file system has no locks
                self._refuse()
        try:
            moved = not os.path.samestat(os.fstat(self.fileno()), self.path.stat())
        except OSError:
            moved = True
        if moved:  # another fetch has just finished
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise CascadeError(f"{self.path} is being fetched by another process; wait until it is done.")

    def close_on_windows(self) -> None:
        """Closes the file where no open one can be moved or removed; elsewhere it stays locked until it has moved."""
        if fcntl is None:
            self.flush_to_disk()
            self.close()

    def flush_to_disk(self) -> None:
        if not self.closed:
            os.fsync(self.fileno())

    def begin(self) -> None:
        """Checks that the disk has room for the remaining bytes; a part that is too long starts anew."""
        if self.tell() > self.size:
            self.seek(0)
            self.truncate()
        remaining, free = self.size - self.tell(), shutil.disk_usage(self.path.parent).free
        if remaining > free:
            raise CascadeError(
                f"{self.path.parent} has {in_words(free)} free, but {in_words(remaining)} are still to come; "
                "free some space, or choose another folder (--to)."
            )
        self.arrived(self.tell(), self.size)

    def write(self, data: Any, /) -> int:
        with _writing(self.path, _RESUMABLE):
            unwritten = memoryview(data)[: self.size - self.tell()]
            while unwritten:
                unwritten = unwritten[super().write(unwritten) :]
        self.arrived(self.tell(), self.size)
        if self.tell() >= self.size:
            raise _Complete
        return len(data)


def _look_up(file: PublishedFile, endpoint: str | None) -> RemoteFile:
    """Looks up a file on the hub. Raises CascadeError where it is not available or cannot be verified."""
    hub = _quiet_hub()
    endpoint = endpoint.rstrip("/") if endpoint else None
    url = hub.hf_hub_url(file.repo, file.path, endpoint=endpoint)
    with _asking(file, url):
        stated = hub.get_hf_file_metadata(url, **_caller())
    sha256 = (stated.etag or "").lower()
    if stated.commit_hash is None or not stated.size or len(sha256) != 64:
        raise CascadeError(
            f"{url} states no commit, size and sha256 as the Hugging Face hub does, so the file could not be "
            "verified; give the address of the hub or of a whole mirror (--endpoint, HF_ENDPOINT)."
        )
    at_commit = hub.hf_hub_url(file.repo, file.path, revision=stated.commit_hash, endpoint=endpoint)
    return RemoteFile(at_commit, stated.size, sha256)


def _transfer(file: PublishedFile, remote: RemoteFile, stream: _PartialFile) -> None:
    """Appends the missing bytes to the part; retries as long as each attempt brings some."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    while (arrived := stream.tell()) < remote.size:
        with _asking(file, remote.url, _RESUMABLE):
            try:
                # Not hf_hub_download, which discards a transfer that ended early. The expected size is compared by
                # `_verify`, since http_get would report another size as a network issue.
                headers = build_hf_headers(**_caller())
                http_get(remote.url, stream, resume_size=arrived, headers=headers)  # type: ignore[arg-type]
                return
            except _Complete:
                return
            except (CascadeError, HfHubHTTPError):
                raise
            except Exception:  # the connection ended
                if stream.tell() <= arrived:
                    raise


def _quiet_hub() -> Any:
    """huggingface_hub without output, telemetry and xet."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_XET = True
    logging.set_verbosity_error()
    disable_progress_bars()
    return huggingface_hub


def _caller() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"library_name": "cascade-nodes", "library_version": version("cascade-nodes")}
    except PackageNotFoundError:  # inside ComfyUI the pack is a folder
        return {"library_name": "cascade-nodes", "library_version": "unknown"}


def _check_size(file: PublishedFile, remote: RemoteFile) -> None:
    """Raises CascadeError where a hub states a much larger size than the published file's."""
    if remote.size > MOST_LARGER * file.size:
        raise CascadeError(
            f"{remote.url} is said to have {in_words(remote.size)}, but the published {file.name} has "
            f"{in_words(file.size)}; give the address of the hub or of a whole mirror (--endpoint, HF_ENDPOINT)."
        )


def _check_same(target: Path, file: PublishedFile, remote: RemoteFile) -> None:
    """Raises CascadeError unless the file under the final name is the published one."""
    with _writing(target):
        size = target.stat().st_size
        if size == remote.size and _sha256(target) == remote.sha256:
            return
    difference = "its sha256" if size == remote.size else f"{size} instead of {remote.size} bytes"
    raise CascadeError(
        f"{target} is there but is not the published {file.name} ({difference}), and nothing is overwritten; "
        "move it away, or fetch into another folder (--to)."
    )


def _verify(partial: Path, file: PublishedFile, remote: RemoteFile) -> None:
    """Raises CascadeError, and removes the part, unless its size and sha256 are the hub's."""
    with _writing(partial):
        size, sha256 = partial.stat().st_size, _sha256(partial)
    if (size, sha256) == (remote.size, remote.sha256):
        return
    partial.unlink(missing_ok=True)
    raise CascadeError(
        f"{file.name} arrived damaged (sha256 {sha256[:16]}… of {size} bytes, but the hub states "
        f"{remote.sha256[:16]}… of {remote.size}) and was removed; fetch it again, if need be from another network."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _writing(path: Path, hint: str = "") -> Iterator[None]:
    """Turns an OSError into a CascadeError that names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in _NO_SPACE
        advice = "free some space" if full else "choose a folder that can be read and written to (--to)"
        advice = f"{advice}; {hint}" if hint else advice
        raise CascadeError(f"{path} cannot be used ({error.strerror or error}); {advice}.") from error


@contextmanager
def _asking(file: PublishedFile, url: str, hint: str = "") -> Iterator[None]:
    """Turns a failed request to the hub into a CascadeError that names the file, the address and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except CascadeError:
        raise
    except errors.HfHubHTTPError as error:
        raise CascadeError(f"{_refusal(file, url, error)}{f'; {hint}' if hint else ''}.") from error
    except Exception as error:  # requests, httpx and the hub each have exceptions of their own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        advice = hint or "look at the connection, or name a mirror (--endpoint, HF_ENDPOINT)"
        raise CascadeError(f"{file.name} did not come from {url} ({reason}); {advice}.") from error


def _refusal(file: PublishedFile, url: str, error: Any) -> str:
    from huggingface_hub import errors

    status = error.response.status_code if error.response is not None else "no answer"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return (
            f"The hub does not give {file.name} to everyone ({status} for {url}); accept its terms at "
            f"https://huggingface.co/{file.repo} and log in with `hf auth login`, or set HF_TOKEN to a valid token"
        )
    if status == 404:
        return (
            f"The hub has no {file.path} in {file.repo} any more (404 for {url}); look at "
            f"https://huggingface.co/{file.repo}"
        )
    return f"The hub answered {status} for {url}; try again later, or name a mirror (--endpoint, HF_ENDPOINT)"
