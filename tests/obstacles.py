"""What stands in the way of reading and writing: a full disk, a lack of permission, other writers."""

import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MAY_IGNORE_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, as bits
_CAPABILITIES_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def memory_limited_to(size: int) -> Iterator[None]:
    """The process gets no more than `size` bytes beyond what it has mapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def permissions_respected() -> Iterator[None]:
    """Permissions hold for this thread even where root, to whom they do not apply, runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)  # 0: this thread
    sets = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted, inheritable; then the same of capabilities from 32 on
    assert _LIBC.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~_MAY_IGNORE_PERMISSIONS
    assert _LIBC.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        assert _LIBC.capset(header, sets) == 0


def respect_permissions() -> None:
    """As `preexec_fn`: permissions hold for the program that is started even where root starts it."""
    if os.geteuid() == 0:
        for capability in range(64):
            if _MAY_IGNORE_PERMISSIONS >> capability & 1:
                _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def no_links(*_: object) -> None:
    """Stands in for os.link on FAT and some network drives."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def in_processes(count: int, work: Callable[[int], object]) -> list[int]:
    """The exit statuses of `count` processes that each believe to be number 1, as in containers."""
    pids = []
    for index in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.getpid = lambda: 1
                work(index)
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
