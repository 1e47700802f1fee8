"""Cascade ControlNet Apply is ComfyUI's own node on our ControlNets, and gives what it gives without ComfyUI."""

SILENT = {"0.3 to 0.45", "0.0 to 0.0"}  # no step lies in these


def test_both_hosts_sample_the_same(measured):
    assert len(measured["hosts"]) == 16
    assert {way: value for way, value in measured["hosts"].items() if not value <= 1e-4} == {}


def test_each_way_has_its_effect(measured):
    assert {way for way, value in measured["effect"].items() if value == 0} == SILENT
    assert {way for way, value in measured["effect"].items() if 0 < value < 1e-3} == set()


def test_it_makes_what_comfyuis_own_node_makes(measured):
    differences = measured["native node"]
    assert differences.pop("pictures") == 0
    assert differences == {"structure": True, "strength 0 returns the prompts": True}
