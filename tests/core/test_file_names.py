"""Numbers behind the names of files that exist."""

from itertools import islice
from pathlib import Path

from cascade_nodes.cascade_core.file_names import numbered


def test_numbers_follow_the_name():
    names = [path.name for path in islice(numbered(Path("x/style.v2.safetensors")), 3)]
    assert names == ["style.v2.safetensors", "style.v2_00001.safetensors", "style.v2_00002.safetensors"]
