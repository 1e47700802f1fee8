"""Live previews: by a learned previewer where its file is there, else by ComfyUI's approximation."""


def test_the_demo_is_shown_through_its_own_networks(measured):
    for kind in ("stage_c", "stage_b"):
        assert measured[f"{kind}, previews"] == 3
        assert measured[f"{kind}, learned"] <= 2


def test_a_previewer_is_found_by_what_is_in_the_file(measured):
    """Eight times the latent's 6 × 6; ComfyUI's own has one pixel for each position."""
    assert measured["without a file"] == [6, 6]
    assert measured["with a file"] == [48, 48]
    assert measured["with a file, learned"] <= 2
