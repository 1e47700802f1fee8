"""The one exception that is meant for users."""


class CascadeError(ValueError):
    """Something the user can mend: one sentence that says what, where, what was expected and what to do."""
