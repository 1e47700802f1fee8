"""Areas in pixels are where they were drawn, in each stage's latent and in every sampler."""

import pytest


@pytest.mark.parametrize(
    ("place", "stage_c", "stage_b"),
    [
        ("the left half", [6, 3, 0, 0], [64, 32, 0, 0]),
        ("the right half", [6, 3, 0, 3], [64, 32, 0, 32]),
        ("between positions", [3, 1, 1, 2], [26, 16, 16, 18]),
        ("over the edge", [6, 2, 0, 4], [64, 16, 0, 48]),
        ("outside", [1, 1, 5, 5], [8, 8, 56, 56]),
        ("a quarter", [3, 3, 3, 3], [32, 32, 32, 32]),
        ("a sliver", [1, 1, 2, 5], [8, 8, 20, 56]),
        ("an empty mask", [6, 6, 0, 0], [8, 8, 0, 0]),
        ("no area", None, None),
    ],
)
def test_an_area_is_where_it_was_drawn(measured, place, stage_c, stage_b):
    assert measured["grids"][f"{place}, stage_c"] == stage_c
    assert measured["grids"][f"{place}, stage_b"] == stage_b


def test_another_compression_has_other_positions(measured):
    assert measured["grids"]["the right half, stage_c, 32"] == [8, 4, 0, 4]
    assert [8, 4] in measured["finer"]


def test_every_area_lies_within_the_latent_and_on_whole_patches(measured):
    sides = {"stage_c": (6, 6), "stage_c, 32": (8, 8), "stage_b": (64, 64), "stage_b, odd": (51, 75)}
    for name, area in measured["grids"].items():
        if area is None:
            continue
        stage = name.partition(", ")[2]
        for size, start, side in zip(area[:2], area[2:], sides[stage], strict=True):
            assert size >= (8 if "stage_b" in stage else 1), name
            assert 0 <= start < start + size <= side, name
            if "stage_b" in stage:
                assert start % 2 == 0, name
                assert size % 2 == 0 or start + size == side, name


def test_each_sampler_gives_the_network_the_area(measured):
    for sampler in ("ours", "KSampler"):
        assert [6, 3] in measured["sides"][f"stage_c, {sampler}"]
        assert [64, 32] in measured["sides"][f"stage_b, {sampler}"]


def test_an_area_of_stage_b_sees_its_part_of_stage_cs_latent(measured):
    assert measured["parts"].keys() == {"ours", "KSampler", "ours, native"}
    assert all(difference <= 1e-5 for difference in measured["parts"].values())
