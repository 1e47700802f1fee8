"""Cases made at random work, or are refused in clean sentences; README.md says how one is repeated by its seed."""

import pytest

from cascade_nodes.tests.fuzz.campaign import failures, run_cases

NIGHTLY = {"server": 220, "kills": 80}
BY_DAY = {"graphs": 20, "server": 15, "kills": 4}


@pytest.mark.parametrize("kind", BY_DAY)
def test_a_few_cases(kind):
    check(kind, 0, BY_DAY[kind])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(f"fuzz {kind}")) for kind in NIGHTLY]
)
def test_many_cases(kind):
    check(kind, 0, NIGHTLY[kind])


def check(kind: str, first: int, count: int) -> None:
    answers = run_cases(kind, first, count)
    assert len(answers) == count
    assert not failures(answers), "\n".join(failures(answers))
