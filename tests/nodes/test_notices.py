"""What a sampler says of its run is plain text and values, which servers copy and write as JSON."""

import copy
import json

from cascade_nodes.nodes.hosts.notices import Notice, shown

NOTICE = Notice("tiles", node="A node {of braces}")


def test_a_notice_is_its_sentence_and_so_is_a_copy():
    assert NOTICE == (
        "A node {of braces} is called for each tile by itself, as if each were a step: "
        "with a cache, set tile_size to 0."
    )
    for again in (copy.deepcopy(NOTICE), copy.copy(NOTICE)):
        assert (again, again.key, again.values) == (NOTICE, "tiles", {"node": "A node {of braces}"})


def test_what_a_node_returns_of_them_is_plain():
    ui = shown((NOTICE,))
    assert type(ui["text"][0]) is str
    assert json.loads(json.dumps(copy.deepcopy(ui))) == {
        "text": [str(NOTICE)],
        "cascade_notices": [["tiles", {"node": "A node {of braces}"}]],
    }
    assert shown(()) == {}
