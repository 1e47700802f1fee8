"""Node API: ComfyUI's own inside ComfyUI, our subset of it everywhere else.

A ComfyUI that is merely installed does not count, as in `hosts.host`: importing its API would load its model
management, which reads the command line and chooses a device.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "comfy.model_management" not in sys.modules:
    from .hosts import schema as io
    from .hosts.schema import ComfyExtension
else:
    from comfy_api.latest import ComfyExtension, io

__all__ = ["ComfyExtension", "io", "searched_as"]

_HAS_ALIASES = any(entry.name == "search_aliases" for entry in fields(io.Schema))


def searched_as(words: str) -> dict[str, Any]:
    """Keyword for `io.Schema`: other names under which a node is searched for, with commas between them.

    Versions of ComfyUI without the keyword get none: there web/search.js appends some of these words to the names
    that the search shows.
    """
    return {"search_aliases": words.split(", ")} if _HAS_ALIASES else {}
