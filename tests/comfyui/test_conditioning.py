"""Areas, ranges, combinations and ControlNets, ComfyUI's own and ours, in ComfyUI's sampling and in ours."""


def test_what_must_make_no_difference(measured):
    differences = {name: value for name, value in measured.items() if name.startswith("same")}
    assert len(differences) == 12
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}


def test_what_must_make_one(measured):
    differences = {name: value for name, value in measured.items() if name.startswith("other")}
    assert len(differences) == 7
    assert {name: value for name, value in differences.items() if not value >= 1e-3} == {}
