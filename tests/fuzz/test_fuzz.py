"""Cases made at random work, or are refused in clean sentences; README.md says how one is repeated by its seed."""

from collections import Counter

import pytest

from cascade_nodes.tests.fuzz.campaign import failures, run_cases, run_worker

NIGHTLY = {
    "graphs": 1000,
    "files": 600,
    "pictures": 220,
    "settings": 220,
    "server": 220,
    "kills": 80,
    "crowds": 40,
}
BY_DAY = {"graphs": 20, "files": 20, "pictures": 20, "settings": 20, "server": 20}


def test_a_few_cases():
    answers, end = run_worker([f"{kind}:{count}" for kind, count in BY_DAY.items()], 0)
    assert Counter(answer["kind"] for answer in answers) == BY_DAY, end
    assert not failures(answers), "\n".join(failures(answers))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(f"fuzz {kind}")) for kind in NIGHTLY]
)
def test_many_cases(kind, seed):
    """Cases differ every day; the head of the report says `--seed`, which repeats them."""
    answers = run_cases(kind, seed * 10_000, NIGHTLY[kind])
    assert len(answers) == NIGHTLY[kind]
    assert not failures(answers), "\n".join(failures(answers))
