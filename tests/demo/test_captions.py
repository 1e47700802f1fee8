"""Captions are true, hard negatives are false, and every prompt of the grammar is read back exactly."""

from random import Random

import pytest

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.captions import (
    ObjectSpec,
    Spec,
    _choose,
    _negated,
    canonical,
    caption,
    contrast,
    full_spec,
    hard_negatives,
    holds,
    known_words,
    parse,
    place_of,
    verbalise,
    vocabulary,
)
from cascade_nodes.demo.wide_scenes import sample_wide
from cascade_nodes.demo.world import Scene, SceneObject, sample_scenes

WIDE = sample_wide(600, seed=12).scenes()
SCENES = sample_scenes(2500, seed=11) + sample_scenes(1500, seed=11, split="held_out")
STAR = SceneObject("star", "red", "large", 0.25, 0.5, 0.18)
RING = SceneObject("ring", "blue", "small", 0.75, 0.5, 0.11)
PAIR = Scene((STAR, RING), "sand", "left")


def words(text):
    return text.replace(",", " ").split()


def test_canonical_says_everything_plainly():
    assert canonical(PAIR) == "a large red star to the left of a small blue ring on a sand background"
    assert canonical(Scene((RING,), "sky")) == "a small blue ring on a sky background"


def test_every_canonical_caption_is_read_back():
    assert all(parse(canonical(scene)) == full_spec(scene) for scene in SCENES)


def test_what_is_said_is_what_is_read():
    rng = Random(1)
    for scene in SCENES * 2:
        spec = _choose(scene, rng)
        assert parse(verbalise(spec, rng)) == spec


def test_every_caption_is_true():
    rng = Random(2)
    assert all(holds(parse(caption(scene, rng)), scene) for scene in SCENES)


def test_every_hard_negative_is_false():
    rng = Random(3)
    for scene in SCENES[::4]:
        negatives = hard_negatives(scene, rng, 4)
        assert len(negatives) == 4
        assert not any(holds(parse(text), scene) for text in negatives)


def test_contrasts_keep_the_wording():
    rng, shared = Random(4), []
    for scene in SCENES[:500]:
        text, negatives = contrast(scene, rng, 3)
        assert holds(parse(text), scene)
        assert len(negatives) == 3
        assert not any(holds(parse(wrong), scene) for wrong in negatives)
        shared += [len(set(words(text)) & set(words(wrong))) / len(set(words(text))) for wrong in negatives]
    assert sum(shared) / len(shared) > 0.7


def test_hard_negatives_swap_as_well_as_replace():
    texts = hard_negatives(PAIR, Random(5), 300)
    specs = [parse(text) for text in texts]
    full = full_spec(PAIR)
    assert Spec(full.objects, "right", "sand", exact=True) in specs
    star, ring = full.objects
    colours = Spec(
        (ObjectSpec("star", "blue", "large"), ObjectSpec("ring", "red", "small")), "left", "sand", exact=True
    )
    assert colours in specs
    assert Spec((star, ring), "left", "grass", exact=True) in specs


def test_captions_use_the_vocabulary_and_all_of_it():
    rng = Random(6)
    used_words = {word for _ in range(6) for scene in SCENES for word in words(caption(scene, rng))}
    assert used_words <= vocabulary()
    assert "no" not in used_words
    for scene in WIDE:
        used_words.update(words(verbalise(_negated(_choose(scene, rng), scene, rng), rng)))
    assert used_words <= vocabulary()
    # Plurals are rare: two objects of one shape.
    assert {word for word in vocabulary() - used_words if not word.endswith("s")} == set()


def test_the_larger_world_is_said_and_read_exactly():
    rng = Random(8)
    specs = [_negated(_choose(scene, rng), scene, rng) for scene in WIDE for _ in range(2)]
    assert sum(len(spec.objects) == 3 for spec in specs) > 200
    assert sum(bool(spec.absent) for spec in specs) > 60
    for spec in specs:
        assert parse(verbalise(spec, rng)) == spec


def test_wide_captions_are_true_with_any_signs_and_their_contrasts_false():
    rng = Random(9)
    texts = [caption(scene, rng, wide=True) for scene in WIDE]
    assert all(holds(parse(text), scene) for text, scene in zip(texts, WIDE, strict=True))
    assert 0.1 < sum(any(sign in text for sign in ".!?;-") for text in texts) / len(texts) < 0.3
    for scene in WIDE[:150]:
        text, negatives = contrast(scene, rng, 3, wide=True)
        assert holds(parse(text), scene)
        assert not any(holds(parse(wrong), scene) for wrong in negatives)


def test_the_words_to_be_shown_are_all_words_what_can_be_drawn_first():
    assert set(known_words()) == {word for name in known_words() for word in name.split()} == vocabulary()
    assert known_words()[:2] == ["circle", "square"]


def test_each_attribute_is_said_alone():
    rng = Random(7)
    single_captions = {caption(scene, rng) for _ in range(4) for scene in SCENES}
    assert {
        "red",
        "white",
        "star",
        "ring",
        "small",
        "sand",
        "something red",
        "two objects",
        "red star",
    } <= single_captions


@pytest.mark.parametrize(
    ("prompt", "spec"),
    [
        ("", Spec()),
        ("no red", Spec(absent=(ObjectSpec(colour="red"),))),
        (
            "a star without a red circle on sand",
            Spec((ObjectSpec("star"),), None, "sand", True, (ObjectSpec("circle", "red"),)),
        ),
        (
            "A red star; a ring and a cross, no hearts!!!",
            Spec(
                (ObjectSpec("star", "red"), ObjectSpec("ring"), ObjectSpec("cross")),
                exact=True,
                absent=(ObjectSpec("heart"),),
            ),
        ),
        (
            "a ring, and a star left of a cross",
            Spec((ObjectSpec("star"), ObjectSpec("cross"), ObjectSpec("ring")), "left", exact=True),
        ),
        ("three small things", Spec((ObjectSpec(size="small"),) * 3, exact=True)),
        ('"a star on grass"...', Spec((ObjectSpec("star"),), background="grass", exact=True)),
        ("red", Spec((ObjectSpec(colour="red"),))),
        ("Something RED.", Spec((ObjectSpec(colour="red"),))),
        ("a sandy backdrop", Spec(background="sand")),
        ("two red stars", Spec((ObjectSpec("star", "red"),) * 2, exact=True)),
        ("red star, small, sand", Spec((ObjectSpec("star", "red", "small"),), background="sand")),
        ("red star, small ring", Spec((ObjectSpec("star", "red"), ObjectSpec("ring", None, "small")))),
        (
            "an orange disc in the top left corner",
            Spec((ObjectSpec("circle", "orange", None, "top left"),), exact=True),
        ),
        (
            "on grass, a red star on the left and a hoop on the right",
            Spec((ObjectSpec("star", "red"), ObjectSpec("ring")), "left", "grass", exact=True),
        ),
        (
            "there is a huge cross beneath one violet box against a gray background",
            Spec(
                (ObjectSpec("cross", None, "large"), ObjectSpec("square", "purple")),
                "below",
                "grey",
                exact=True,
            ),
        ),
    ],
)
def test_prompts_as_people_write_them(prompt, spec):
    assert parse(prompt) == spec


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red horse", "does not know 'horse'"),
        ("a red star above", "names 1 objects"),
        ("a star, a ring, a cross, a heart", "names 4 objects"),
        ("a star, no grass", "says what the background is not"),
        ("a star above a ring left of a star", "two relations"),
    ],
)
def test_what_the_world_does_not_have_is_refused(prompt, message):
    with pytest.raises(CascadeError, match=message):
        parse(prompt)


@pytest.mark.parametrize(
    ("prompt", "true"),
    [
        ("red", True),
        ("green", False),
        ("a blue ring to the right of a star", True),
        ("a blue ring to the left of a star", False),
        ("a red ring left of a blue star", False),
        ("a red star", False),  # there is a ring as well
        ("red star", True),
        ("two objects", True),
        ("a star and a ring, no green", True),
        ("red star, no ring", False),
        ("no circle", True),
        ("no objects", False),
        ("a large star and a small ring on a sky background", False),
    ],
)
def test_what_holds_of_a_scene(prompt, true):
    assert holds(parse(prompt), PAIR) is true


def test_places():
    assert [place_of(*point) for point in [(0.2, 0.2), (0.5, 0.5), (0.5, 0.9), (0.8, 0.5), (0.41, 0.5)]] == [
        "top left", "middle", "bottom", "right", None,
    ]  # fmt: skip
