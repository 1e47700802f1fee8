"""Areas, ranges, combinations and ControlNets, ComfyUI's own and ours, in ComfyUI's sampling and in ours."""


def test_what_must_make_no_difference(measured):
    found = {name: value for name, value in measured.items() if name.startswith("same")}
    assert len(found) == 12
    assert {name: value for name, value in found.items() if not value <= 1e-4} == {}


def test_what_must_make_one(measured):
    found = {name: value for name, value in measured.items() if name.startswith("other")}
    assert len(found) == 7
    assert {name: value for name, value in found.items() if not value >= 1e-3} == {}
