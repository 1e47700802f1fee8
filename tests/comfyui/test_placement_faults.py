"""What goes wrong in the middle leaves main memory and the card as they should be, and the next run right."""

from typing import Any

import pytest


@pytest.fixture
def found(measured: dict[str, Any]):
    """Gives what one scenario found."""

    def of(scenario: str) -> dict[str, Any]:
        assert "error" not in measured[scenario], measured[scenario]["error"]
        return measured[scenario]

    return of


@pytest.mark.parametrize("scenario", ["begun again", "interrupted", "out of memory", "emptied"])
def test_leaves_nothing_wrong(found, scenario):
    for case, result in found(scenario).items():
        assert result["faults"] == [], case


def test_a_run_begun_again_is_told(found):
    assert all(result["told"] == [True, True] for result in found("begun again").values())


def test_faults_happened(found):
    assert all(result["raised"] > 2 for result in found("interrupted").values())  # out of memory, it goes on
    assert all(result["raised"] for result in found("out of memory").values())
