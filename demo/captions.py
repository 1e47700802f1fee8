"""Captions of scenes: true ones (`caption`, `canonical`), and false ones on purpose (`hard_negatives`)."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from random import Random

import numpy as np

from cascade_nodes.demo.grammar import (
    BACKGROUND_NOUNS,
    PLACES,
    RELATION_WORDS,
    ObjectSpec,
    Spec,
    known_words,
    parse,
    verbalise,
    vocabulary,
)
from cascade_nodes.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    is_held_out_pair,
    relation_of,
)
from cascade_nodes.demo.words import ENDS, PAUSES, QUOTES

__all__ = [
    "ObjectSpec",
    "Spec",
    "canonical",
    "caption",
    "contrast",
    "full_spec",
    "hard_negatives",
    "holds",
    "known_words",
    "parse",
    "place_of",
    "punctuated",
    "stands_at",
    "verbalise",
    "vocabulary",
]

FRAGMENTS, TAGS = 0.12, 0.08  # shares of the captions that are not sentences
FULL = 0.25  # share of the sentences that leave nothing out
NEGATED, PUNCTUATED = 0.12, 0.2  # in the larger world, shares of captions with negation, with punctuation
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
# Borders of the thirds of the frame, with gaps that belong to none, so that a stated place is certain.
NEAR, MIDDLE, FAR = 0.39, (0.43, 0.57), 0.61


def caption(scene: Scene, rng: Random, wide: bool = False) -> str:
    """Random true description: a sentence, tags or a fragment, with random omissions.

    wide: in the larger world's language, which has negations ("no red") and meaningless punctuation.
    """
    if not wide:
        return verbalise(_choose(scene, rng), rng)
    return punctuated(verbalise(_negated(_choose(scene, rng), scene, rng), rng), rng)


def canonical(scene: Scene) -> str:
    """Full plain description: "a large red star to the left of a small blue ring on a sand background"."""
    phrases = [f"a {o.size} {o.colour} {o.shape}" for o in scene.objects]
    joint = f" {RELATION_WORDS[scene.relation][0]} " if scene.relation else ""
    related = ", and ".join([joint.join(phrases[:2]), *phrases[2:]])
    return f"{related} on a {BACKGROUND_NOUNS[scene.background][0]} background"


def full_spec(scene: Scene) -> Spec:
    """Spec of everything that a caption can state about the scene, except places."""
    return Spec(tuple(_object_spec(o) for o in scene.objects), scene.relation, scene.background, exact=True)


def holds(spec: Spec, scene: Scene) -> bool:
    """Whether the spec is true of the scene."""
    if spec.background not in (None, scene.background):
        return False
    if len(spec.objects) > len(scene.objects) or (spec.exact and len(spec.objects) != len(scene.objects)):
        return False
    for order in permutations(range(len(scene.objects)), len(spec.objects)):
        relation = _relation(scene, order[:2])
        described = all(_describes(o, scene.objects[i]) for o, i in zip(spec.objects, order, strict=True))
        if described and spec.relation in (None, relation):
            return not any(_describes(absent, o) for absent in spec.absent for o in scene.objects)
    return False


def _relation(scene: Scene, order: tuple[int, ...]) -> str | None:
    """The relation of one object to another: of the first two as stated, seen from either; else by positions."""
    if order in ((0, 1), (1, 0)):
        return scene.relation if order == (0, 1) else INVERSE.get(scene.relation or "")
    if len(order) < 2:
        return scene.relation
    first, second = (np.array([scene.objects[i].x, scene.objects[i].y]) for i in order)
    return RELATIONS[int(relation_of(first, second, np.array(scene.aspect)))]


def _describes(spec: ObjectSpec, o: SceneObject) -> bool:
    stated = ((spec.shape, o.shape), (spec.colour, o.colour), (spec.size, o.size))
    return all(stated_value in (None, value) for stated_value, value in stated) and (
        spec.place is None or stands_at(o.x, o.y, spec.place)
    )


def stands_at(x: float, y: float, place: str, slack: float = 0.0) -> bool:
    """Whether the point is in that ninth of the frame, or up to `slack` outside of it."""

    def within(value: float, low: str, high: str) -> bool:
        if low in place:
            return value < NEAR + slack
        if high in place:
            return value > FAR - slack
        return MIDDLE[0] - slack < value < MIDDLE[1] + slack

    return within(x, "left", "right") and within(y, "top", "bottom")


def place_of(x: float, y: float) -> str | None:
    """The ninth of the frame that certainly holds the point, else None."""
    return next((place for place in PLACES if stands_at(x, y, place)), None)


# Choosing what to state


def _object_spec(o: SceneObject) -> ObjectSpec:
    return ObjectSpec(o.shape, o.colour, o.size)


def _turned(spec: Spec) -> Spec:
    """Swaps the first two objects of a spec and inverts the relation."""
    objects = (*spec.objects[:2][::-1], *spec.objects[2:])
    return replace(spec, objects=objects, relation=INVERSE.get(spec.relation or ""))


def _choose(scene: Scene, rng: Random) -> Spec:
    spec = full_spec(scene)
    if rng.random() < 0.5:
        spec = _turned(spec)
    style = rng.random()
    if style < FRAGMENTS:
        return _fragment(spec, rng)
    if style < FRAGMENTS + TAGS:
        objects = tuple(replace(_thinned(o, rng), shape=o.shape) for o in spec.objects)
        relation = spec.relation if rng.random() < 0.5 else None
        return Spec(objects, relation, spec.background if rng.random() < 0.5 else None)
    return _sentence(spec, scene, rng)


def _thinned(o: ObjectSpec, rng: Random) -> ObjectSpec:
    """Omits attributes: the size often, the colour and the shape seldom."""
    return ObjectSpec(
        o.shape if rng.random() < 0.94 else None,
        o.colour if rng.random() < 0.88 else None,
        o.size if rng.random() < 0.55 else None,
    )


def _sentence(spec: Spec, scene: Scene, rng: Random) -> Spec:
    objects = spec.objects
    if rng.random() >= FULL:
        objects = tuple(_thinned(o, rng) for o in objects)
        spec = replace(spec, background=spec.background if rng.random() < 0.5 else None)
        if len(objects) >= 2 and rng.random() < 0.12:
            spec = replace(spec, relation=None)
    if len(objects) == 1 and rng.random() < 0.25:
        only = scene.objects[0]
        objects = (replace(objects[0], place=place_of(only.x, only.y)),)
    return replace(spec, objects=objects)


def _fragment(spec: Spec, rng: Random) -> Spec:
    """States one attribute alone, so that each word is learned by itself."""
    o = spec.objects[0]
    kind = rng.random()
    if kind < 0.30:
        return Spec((ObjectSpec(colour=o.colour),))
    if kind < 0.55:
        return Spec((ObjectSpec(shape=o.shape),))
    if kind < 0.63:
        return Spec((ObjectSpec(size=o.size),))
    if kind < 0.78:
        return Spec((ObjectSpec(shape=o.shape, colour=o.colour),))
    if kind < 0.84:
        return Spec((ObjectSpec(size=o.size, colour=o.colour),))
    if kind < 0.92:
        return Spec(background=spec.background)
    return _counted(spec, rng)


def _counted(spec: Spec, rng: Random) -> Spec:
    """Counts objects: "an object", "two objects", or with shared attributes, "two red stars"."""
    common = {}
    for name in ATTRIBUTES:
        values = {getattr(o, name) for o in spec.objects}
        if len(values) == 1 and rng.random() < 0.6:
            common[name] = values.pop()
    return Spec((ObjectSpec(**common),) * len(spec.objects), exact=True)


def _negated(spec: Spec, scene: Scene, rng: Random) -> Spec:
    """Sometimes adds something that the scene does not have; then often omits that kind of attribute of its objects."""
    if rng.random() >= NEGATED:
        return spec
    absent = []
    for _ in range(1 if rng.random() < 0.75 else 2):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        form = rng.random()
        if is_held_out_pair(np.array(SHAPES.index(shape) * 8 + COLOURS.index(colour))):
            form = form * 0.8
        stated = (
            ObjectSpec(colour=colour)
            if form < 0.45
            else ObjectSpec(shape=shape)
            if form < 0.8
            else ObjectSpec(shape, colour)
        )
        if stated not in absent and not any(_describes(stated, o) for o in scene.objects):
            absent.append(stated)
    if absent and rng.random() < 0.5:
        unsaid = {name: None for name in ("colour", "shape") if getattr(absent[0], name)}
        spec = replace(spec, objects=tuple(replace(o, **unsaid) for o in spec.objects))
    if absent and rng.random() < 0.1:
        spec = Spec(background=spec.background)
    return replace(spec, absent=tuple(absent))


def punctuated(text: str, rng: Random, share: float = PUNCTUATED) -> str:
    """Adds meaningless punctuation to a share of the captions: "a red star; on grass!!!"."""
    if not text or rng.random() >= share:
        return text
    if rng.random() < 0.4:
        text = text.replace(", ", rng.choice(PAUSES))
    if rng.random() < 0.15:
        signs = rng.choice(QUOTES)
        text = signs[0] + text + signs[-1]
    if rng.random() < 0.3:
        text = text.capitalize()
    return text + rng.choice(ENDS)


# False captions


def hard_negatives(scene: Scene, rng: Random, n: int) -> list[str]:
    """n captions false in one respect: relation, colours, shapes or sizes swapped, or one attribute replaced."""
    spec = full_spec(scene)
    negatives = []
    while len(negatives) < n:
        base = spec if rng.random() < 0.4 else _sentence(spec, scene, rng)
        negatives += _falsehoods(base, scene, rng, 1, rng.getrandbits(32))
    return negatives


def contrast(scene: Scene, rng: Random, n: int, wide: bool = False) -> tuple[str, list[str]]:
    """Caption and n hard negatives of it that keep its wording where possible.  wide: as for `caption`"""
    if not wide:
        spec, seed = _choose(scene, rng), rng.getrandbits(32)
        negatives = _falsehoods(spec, scene, rng, n, seed)
        return verbalise(spec, Random(seed)), negatives + hard_negatives(scene, rng, n - len(negatives))
    spec, seed = _negated(_choose(scene, rng), scene, rng), rng.getrandbits(32)
    negatives = _falsehoods(spec, scene, rng, n, seed)
    negatives += hard_negatives(scene, rng, n - len(negatives))
    right, *wrong = (punctuated(text, Random(seed)) for text in (verbalise(spec, Random(seed)), *negatives))
    return right, wrong


def _falsehoods(spec: Spec, scene: Scene, rng: Random, n: int, seed: int) -> list[str]:
    """Up to n captions that are false by one swap or replacement in a spec, in the words of a seed."""

    def changed() -> Spec:
        return (_swap if len(spec.objects) >= 2 and rng.random() < 0.6 else _replace)(spec, rng)

    return false_captions(changed, scene, n, seed)


def false_captions(draw: Callable[[], Spec], scene: Scene, n: int, seed: int) -> list[str]:
    """Up to n false captions of different drawn specs, verbalised with the same random choices of words."""
    found: list[Spec] = []
    for _ in range(3 * n):
        candidate = draw()
        if candidate not in found and not holds(candidate, scene):
            found.append(candidate)
            if len(found) == n:
                break
    return [verbalise(candidate, Random(seed)) for candidate in found]


def _swap(spec: Spec, rng: Random) -> Spec:
    """Swaps an attribute between two objects, or inverts the relation."""
    attribute = rng.choice(("relation", "relation", "shape", "colour", "size"))
    if attribute == "relation":
        return replace(spec, relation=INVERSE.get(spec.relation or ""))
    first, second = (0, 1) if len(spec.objects) == 2 else sorted(rng.sample(range(len(spec.objects)), 2))
    a, b = spec.objects[first], spec.objects[second]
    swapped = list(spec.objects)
    swapped[first] = replace(a, **{attribute: getattr(b, attribute)})
    swapped[second] = replace(b, **{attribute: getattr(a, attribute)})
    return replace(spec, objects=tuple(swapped))


def _replace(spec: Spec, rng: Random) -> Spec:
    """Replaces one stated attribute by another."""
    choices: list[Callable[[], Spec]] = []
    for index, o in enumerate(spec.objects):
        for name in ("shape", "colour", "size"):
            if getattr(o, name):
                choices.append(lambda i=index, name=name: _with(spec, i, name, rng.choice(ATTRIBUTES[name])))
        if o.place:
            choices.append(lambda i=index: _with(spec, i, "place", rng.choice(tuple(PLACES))))
    if spec.background:
        choices.append(lambda: replace(spec, background=rng.choice(BACKGROUNDS)))
    if spec.relation:
        choices.append(lambda: replace(spec, relation=rng.choice(RELATIONS)))
    for o in spec.absent:  # "no red star" becomes "a red star", or an existing object is negated
        if len(spec.objects) < 3:
            choices.append(lambda o=o: replace(spec, objects=(*spec.objects, o), absent=()))
        for name in ("shape", "colour"):
            if getattr(o, name):
                choices.append(lambda o=o, name=name: replace(spec, absent=(_other(o, name, rng),)))
    return rng.choice(choices)() if choices else spec


def _other(o: ObjectSpec, name: str, rng: Random) -> ObjectSpec:
    return replace(o, **{name: rng.choice(ATTRIBUTES[name])})


def _with(spec: Spec, index: int, name: str, value: str) -> Spec:
    objects = list(spec.objects)
    objects[index] = replace(objects[index], **{name: value})
    return replace(spec, objects=tuple(objects))
