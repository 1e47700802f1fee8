"""Patterns of names of layers and modules, such as `up_blocks.*.to_q`."""

from collections.abc import Collection
from fnmatch import fnmatchcase

from ...errors import CascadeError, quoted

MOST_PATTERNS, LONGEST_PATTERN = 200, 200  # each is compared with thousands of names


def check_patterns(patterns: Collection[str], key: str) -> None:
    """Raises CascadeError for too many or too long patterns to compare with a network's names.

    fnmatch itself takes at most the time of pattern length × name length, since its stars do not backtrack.
    """
    if len(patterns) > MOST_PATTERNS:
        raise CascadeError(f"{key} has {len(patterns):,} patterns; give at most {MOST_PATTERNS}.")
    for pattern in patterns:
        if len(pattern) > LONGEST_PATTERN:
            raise CascadeError(
                f"{key}: {quoted(pattern)} has {len(pattern):,} characters; give at most {LONGEST_PATTERN}."
            )


def is_match(name: str, pattern: str) -> bool:
    """Whether a pattern matches a whole name, or its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
