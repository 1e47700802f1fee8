"""Captions for training the words for positions: places in the frame, and inverted relations."""

import re
from dataclasses import replace
from random import Random

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.captions import (
    Spec,
    caption,
    contrast,
    false_captions,
    full_spec,
    hard_negatives,
    holds,
    parse,
    place_of,
    verbalise,
)
from cascade_nodes.demo.scenes import INVERSE, Scene
from cascade_nodes.demo.words import PLACES, RELATION_WORDS

PLACED = 0.15  # share of captions that state places instead of relations
_TURNED = {
    phrase: RELATION_WORDS[INVERSE[relation]][min(i, len(RELATION_WORDS[INVERSE[relation]]) - 1)]
    for relation, phrases in RELATION_WORDS.items()
    for i, phrase in enumerate(phrases)
}
_RELATIONS = re.compile(rf"\b({'|'.join(sorted(_TURNED, key=len, reverse=True))})\b")


def captioned(scene: Scene, rng: Random) -> str:
    """A random true caption, sometimes with places."""
    spec = placed(scene, rng) if rng.random() < PLACED else None
    return verbalise(spec, rng) if spec else caption(scene, rng, wide=True)


def contrasted(scene: Scene, rng: Random, count: int) -> list[str]:
    """A true caption, `count` false ones in similar words, and the true one with its relation inverted, or ""."""
    spec = placed(scene, rng) if rng.random() < PLACED else None
    if spec is None:
        right, wrong = contrast(scene, rng, count, wide=True)
    else:
        seed = rng.getrandbits(32)
        right, wrong = verbalise(spec, Random(seed)), misplaced(spec, scene, rng, count, seed)
        wrong += hard_negatives(scene, rng, count - len(wrong))
    return [right, *wrong, turned(right, scene)]


def placed(scene: Scene, rng: Random) -> Spec | None:
    """Spec of the objects with their places, "a red star on the left"; None where no place is certain."""
    spec = full_spec(scene)
    objects = tuple(
        replace(stated, size=stated.size if rng.random() < 0.4 else None, place=place_of(o.x, o.y))
        for stated, o in zip(spec.objects, scene.objects, strict=True)
    )
    if not any(o.place for o in objects):
        return None
    background = spec.background if rng.random() < 0.4 else None
    return Spec(objects, background=background, exact=True)


def misplaced(spec: Spec, scene: Scene, rng: Random, count: int, seed: int) -> list[str]:
    """Up to `count` captions with a false place, worded like the true caption of that seed."""
    stated = [i for i, o in enumerate(spec.objects) if o.place]

    def elsewhere() -> Spec:
        i = rng.choice(stated)
        objects = list(spec.objects)
        objects[i] = replace(objects[i], place=rng.choice(tuple(PLACES)))
        return replace(spec, objects=tuple(objects))

    return false_captions(elsewhere, scene, count, seed)


def turned(text: str, scene: Scene) -> str:
    """The caption with its relation inverted; "" if it states none, or would still be true."""
    if len(_RELATIONS.findall(text)) != 1:
        return ""
    changed = _RELATIONS.sub(lambda match: _TURNED[match[0]], text)
    try:
        return "" if holds(parse(changed), scene) else changed
    except CascadeError:
        return ""
