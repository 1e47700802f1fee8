"""What every version of ComfyUI tells its front end of our nodes: always the same, but for lists of files."""

import json

from cascade_nodes.tests.comfyui.record_object_info import RECORD, told

FROZEN = json.loads(RECORD.read_text(encoding="utf-8"))


def test_object_info_equals_the_frozen_schema(server):
    record = told(server)
    assert record.keys() == FROZEN.keys()
    for name, info in record.items():
        assert info == FROZEN[name], f"{name}: if that is meant, run record_object_info.py"


def test_every_node_has_aliases_where_the_search_reads_them(server):
    (native,) = server.get("/object_info/KSampler").values()
    for name in FROZEN:
        (info,) = server.get(f"/object_info/{name}").values()
        aliases = info.get("search_aliases") or []
        assert ("stable cascade" in aliases) == ("search_aliases" in native), name


def test_loaders_list_what_is_there(server):
    info = server.get("/object_info/StageCLoader")["StageCLoader"]
    _, options = info["input"]["required"]["file"]
    assert options["options"][0] == options["default"] == "demo_stage_c.safetensors"
    assert "tiny_stage_c.safetensors" in options["options"]
