"""Our networks compute what ComfyUI's own do from the same weights."""


def test_networks_agree_with_comfyui(measured):
    assert len(measured) == 10
    assert {name: value for name, value in measured.items() if not value <= 1e-5} == {}
