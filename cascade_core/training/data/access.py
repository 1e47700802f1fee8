"""Limits on listing training data: readable paths, number of files, and the request to stop."""

import os
from collections.abc import Callable
from pathlib import Path

from ...errors import CascadeError, Interrupted, printable

MAX_NAMES = (
    4_000_000  # in folders and tars together; a hundred webdatasets of 10,000 pictures each have fewer
)


class Access:
    """Counts the names that are listed, and checks along the way whether to stop.

    stop: whether the run should end; called at every file. check: raises CascadeError for a path, with links
    resolved, that may not be read; None: every path may.
    """

    def __init__(
        self,
        stop: Callable[[], bool] = lambda: False,
        check: Callable[[Path], None] | None = None,
    ):
        self.stop, self.check, self.names = stop, check, 0

    def ask(self) -> None:
        """Raises Interrupted where the run should end."""
        if self.stop():
            raise Interrupted("The run was stopped; the latents encoded so far are kept.")

    def count(self, place: str | Path) -> None:
        """Counts one more name in a folder or a tar. Raises CascadeError for more than MAX_NAMES."""
        self.ask()
        self.names += 1
        if self.names > MAX_NAMES:
            raise CascadeError(
                f"The training data holds more than {MAX_NAMES:,} files, as {printable(str(place))} was listed; "
                "give a folder that holds training pictures alone."
            )

    def permit(self, path: str | Path) -> None:
        """Raises CascadeError for a path that, with links resolved, lies outside of the readable folders."""
        if self.check is not None:
            self.check(Path(os.path.realpath(path)))

    def leads_out(self, path: str | Path) -> bool:
        """Whether this path in a permitted folder is a link that leads outside of the readable folders."""
        if self.check is not None and os.path.islink(path):
            try:
                self.permit(path)
            except CascadeError:
                return True
        return False
