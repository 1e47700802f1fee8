"""What an error says can be written anywhere."""

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.pictures import PictureError


@pytest.mark.parametrize("error", [CascadeError("a\ud800 星"), PictureError("a\ud800 星")])
def test_halves_of_characters_are_escaped(error):
    assert str(error) == "a\\ud800 星"
    str(error).encode()
