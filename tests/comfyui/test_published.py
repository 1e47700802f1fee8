"""Files of the published widths through ComfyUI's own loaders and text encoder, and through ours."""


def test_published_widths_agree_with_comfyui(checkout):
    differences = checkout.inside("published")
    assert len(differences) == 6
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}
