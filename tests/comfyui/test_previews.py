"""Live previews: by a learned previewer where its file is there, else by ComfyUI's approximation."""

from itertools import pairwise

import pytest

from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.graphs import tiny

ROUNDED = 0.501  # of 255: a preview's numbers are rounded to whole ones
METHODS = [None, "default", "auto", "none"]  # of a prompt; None: a front end that does not know it


def test_the_demo_is_shown_through_its_own_networks(measured):
    for kind in ("stage_c", "stage_b"):
        assert measured[f"{kind}, previews"] == 3
        assert measured[f"{kind}, learned"] <= ROUNDED


def test_the_approximation_is_comfyuis(measured):
    for kind in ("stage_c", "stage_b"):
        assert measured[f"{kind}, approximation"] <= 2


def test_a_previewer_is_found_by_what_is_in_the_file(measured):
    """The demo's previews have 8 pixels for each position of 6 × 6; ComfyUI's own have one."""
    assert measured["without a file"] == [6, 6]
    assert measured["with a file"] == [48, 48]
    assert measured["with a file, learned"] <= ROUNDED
    assert measured["when it is gone"] == [6, 6]


def test_its_file_is_read_once(measured):
    """A damaged file beside it, which comes first, is read once too."""
    assert measured["files read in three runs"] == 2
    assert measured["files read when one has changed"] == 4
    assert measured["in the model's weights"] == []


def test_the_latent_is_the_same_without_previews(measured):
    """Runs have areas, tiles and batches; previews: by `none`, `auto` and `latent2rgb`."""
    assert len(measured["same"]) == 7
    for same, previews in measured["same"].values():
        assert same
        assert previews == [0, 3, 3]


def test_four_a_second_and_a_tenth_of_the_time(measured):
    times = measured["times"]
    often, seldom, slow = times.values()
    assert often == [pytest.approx(0.1 + 0.3 * i) for i in range(7)]  # steps of 0.1 s: each third one
    assert all(after - before >= 10 * 0.04 for before, after in pairwise(seldom))
    assert len(slow) == 20


def test_no_run_fails_for_its_previews(measured):
    failing = measured["failing"]
    assert failing["as it shows"] == [True, 0, 1]
    assert failing["as it is made"] == [True, 0, 1]
    assert failing["computed where nobody looks"] == 0


def test_who_chose_none(measured):
    """ComfyUI's default looks like a `none` that somebody chose."""
    assert measured["methods"] == {
        "nothing": "auto",
        "other words": "auto",
        "no server": "auto",
        "none": "none",
        "=none": "none",
        "shortened": "none",
        "none, and auto for the prompt": "auto",
        "auto": "auto",
        "auto, and none for the prompt": "none",
        "none for the prompt": "none",
        "default for the prompt": "auto",
        "latent2rgb for the prompt": "latent2rgb",
        "no words for the prompt": "auto",
        "nobody's prompt": "none",
        "nobody's prompt, auto": "auto",
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_front_end_chooses(client: Client, method: str | None):
    """The server was started without a preview method."""
    execution = client.run(tiny({"7.seed": METHODS.index(method) + 110}), preview_method=method)
    assert execution.error is None
    assert "8" in execution.executed
    assert bool(execution.previews) == (method != "none")
