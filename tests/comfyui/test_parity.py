"""Our networks compute what ComfyUI's own do from the same weights."""


def test_networks_agree_with_comfyui(checkout):
    differences = checkout.inside("parity")
    assert len(differences) == 10
    assert {name: value for name, value in differences.items() if not value <= 1e-5} == {}
