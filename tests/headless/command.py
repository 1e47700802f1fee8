"""`cascade` as a program of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any


def _listen_to_ctrl_c() -> None:
    """A shell that runs the tests in the background makes its processes deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    *arguments: str, prepare: Callable[[], None] = _listen_to_ctrl_c, **options: Any
) -> subprocess.Popen[str]:
    """Starts `cascade ARGUMENTS`; `prepare` runs in the new process first."""
    command = [sys.executable, "-m", "cascade_nodes.headless", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=prepare, **pipes | options)


def errors_of(process: subprocess.Popen[str]) -> IO[str]:
    """The standard error of a process from `start`."""
    assert process.stderr is not None
    return process.stderr
