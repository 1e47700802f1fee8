import pytest

from cascade_nodes.tests.headless.toy_nodes import CALLS


@pytest.fixture
def calls() -> list[str]:
    """The toy nodes that ran in this test, in order."""
    CALLS.clear()
    return CALLS
