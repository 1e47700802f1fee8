"""Node API: ComfyUI's own inside ComfyUI, our subset of it everywhere else.

A ComfyUI that is merely installed does not count, as in `hosts.host`: importing its API would load its model
management, and with it its command line and its choice of device.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "comfy.model_management" not in sys.modules:
    from .hosts import schema as io
    from .hosts.schema import ComfyExtension
else:
    from comfy_api.latest import ComfyExtension, io

__all__ = ["ComfyExtension", "io"]
