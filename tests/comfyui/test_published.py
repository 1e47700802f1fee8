"""Files of the published widths through ComfyUI's own loaders and text encoder, and through ours."""

import tempfile

import pytest


@pytest.fixture(scope="session")
def published():
    """A folder for the files, which are large: they are written once, and gone in the end."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_PUBLISHED", folder)
        yield


def test_published_widths_agree_with_comfyui(checkout, published):
    differences = checkout.inside("published")["published"].numbers
    assert len(differences) == 6
    assert {name: value for name, value in differences.items() if not value <= 1e-4} == {}
