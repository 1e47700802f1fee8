"""Writes tests/data/object_info.json: what ComfyUI's `/object_info` tells of our nodes.

    COMFYUI_PATH=PATH_TO_COMFYUI_0.3.64 python -m cascade_nodes.tests.comfyui.record_object_info

To be run when nodes were added or texts changed. What released workflows rely on must stay as it is:
tests/nodes/frozen_nodes.json holds that.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from cascade_nodes.nodes.extension import NODES
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, Server

RECORD = Path(__file__).parents[1] / "data" / "object_info.json"
FILE_INPUTS = ("file", "previewer", "stage_c", "text_encoder", "compressor")
# What later versions than 0.3.64 tell as well; our nodes make no use of any.
ADDED_LATER = {
    "dev_only": False,
    "essentials_category": None,
    "has_intermediate_output": False,
    "is_input_list": False,
    "output_matchtypes": None,
    "price_badge": None,
}


def told(server: Server) -> dict[str, Any]:
    """`/object_info` of each of our nodes by id, without its lists of files and in the form of 0.3.64."""
    return {node.__name__: _frozen_form(server.get(f"/object_info/{node.__name__}")) for node in NODES}


def _frozen_form(answer: dict[str, Any]) -> dict[str, Any]:
    (info,) = answer.values()
    info.pop("search_aliases", None)  # of versions whose search reads them
    for kind in ("required", "optional"):  # hidden ones are the server's
        for input_id, (_, options) in info["input"].get(kind, {}).items():
            if input_id in FILE_INPUTS and "options" in options:
                options["options"] = "files"
    return {key: value for key, value in info.items() if key not in ADDED_LATER or value != ADDED_LATER[key]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Server(CHECKOUTS[0], Path(folder)) as server:
        record = told(server)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(
        json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"{RECORD.name}: {len(record)} nodes of ComfyUI {CHECKOUTS[0].version}")  # noqa: T201


if __name__ == "__main__":
    main()
