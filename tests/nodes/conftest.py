import pytest

from cascade_nodes.tests.nodes.tiny import write_cascade


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder laid out as ComfyUI's `models`, with a tiny cascade."""
    folder = tmp_path_factory.mktemp("models")
    write_cascade(folder)
    return folder


@pytest.fixture
def tiny(models, monkeypatch):
    """The same folder, found by the headless host."""
    monkeypatch.setenv("CASCADE_MODELS", str(models))
    return models
