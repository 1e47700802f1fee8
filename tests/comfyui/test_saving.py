"""What ComfyUI's save nodes write of our networks is the same network when it is loaded again."""


def test_every_network_is_the_same_when_it_is_loaded_again(measured):
    differences = measured["differences"]
    assert len(differences) == 2 * 2 * 8
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}
    assert all(measured["carried"].values())  # the demo's configurations cannot be inferred from tensors
