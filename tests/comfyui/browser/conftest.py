"""Nodes 2.0 came long after 0.3.64, so they are tested in the newest version alone."""

import pytest

from cascade_nodes.tests.comfyui.checkout import CHECKOUTS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of a kind of nodes that a version does not have."""

    def exists(item: pytest.Item) -> bool:
        values = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        return values.get("seen") != "nodes2" or values.get("checkout") in (None, *CHECKOUTS[-1:])

    left_out = [item for item in items if not exists(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if exists(item)]
