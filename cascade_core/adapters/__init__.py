"""LoRA files of every dialect, learned tokens, and how they change a network."""

from ..text.learned_tokens import LearnedToken
from .about import describe_file, describe_notes
from .adapter import Adapter
from .changes import Change, LowRank
from .compatibility import (
    adapter_facts,
    check_finite_adapter,
    check_finite_changes,
    check_fits,
    describe_adapter,
    describe_unknown,
)
from .dialects import DIALECTS
from .read import parse_adapter, read_adapter
from .write import to_dialect, write_adapter

__all__ = [
    "DIALECTS",
    "Adapter",
    "Change",
    "LearnedToken",
    "LowRank",
    "adapter_facts",
    "check_finite_adapter",
    "check_finite_changes",
    "check_fits",
    "describe_adapter",
    "describe_file",
    "describe_notes",
    "describe_unknown",
    "parse_adapter",
    "read_adapter",
    "to_dialect",
    "write_adapter",
]
