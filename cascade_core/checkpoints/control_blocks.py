"""Stage C's residual blocks that a ControlNet's projections are for, if its file's metadata has no `config`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import CascadeError
from .files import read_text

NAME = "controlnet_blocks"  # its name in the published settings of training and inference
_IN_FLOW = re.compile(rf"^{NAME}:[ \t]*\[([^\]]{{0,9999}})\]", re.MULTILINE)
_IN_LINES = re.compile(rf"^{NAME}:[ \t]*\n((?:[ \t]*-[ \t]*\d{{1,9}}[ \t]*(?:\n|$)){{1,999}})", re.MULTILINE)


def stated_blocks(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """{config: JSON} of the blocks that a file's metadata states, or the YAML settings of the same name beside it.

    Empty where neither states them. Raises CascadeError for anything but a list of numbers.
    """
    beside = next(
        (path.with_suffix(end) for end in (".yaml", ".yml") if path.with_suffix(end).exists()), None
    )
    if NAME in metadata:
        text, where = metadata[NAME], f"{path.name}'s metadata"
    elif beside is not None:
        settings, where = read_text(beside), str(beside)
        found = _IN_FLOW.search(settings) or _IN_LINES.search(settings)
        if found is None and f"{NAME}:" not in settings:
            return {}
        text = found[1] if found else "?"
    else:
        return {}
    numbers = [int(number) for number in re.findall(r"\d{1,9}", text)]
    if not numbers or re.search(r"[^\d\s,\[\]-]", text):
        raise CascadeError(
            f"{where} has no list of numbers as {NAME}; write the numbers of Stage C's residual blocks, such as "
            "[0, 4, 8, 12, 51, 55, 59, 63]."
        )
    return {"config": json.dumps({"proj_blocks": numbers})}
