"""What ends a run: an error that the user can mend, or the user."""


class CascadeError(ValueError):
    """Something the user can mend: one sentence that says what, where, what was expected and what to do."""


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop. Not an error: let it pass."""
