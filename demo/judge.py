"""Scores pictures of the toy world: `summary(score(r, s) for r, s in zip(read(images), specs))`."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from cascade_nodes.demo.captions import ObjectSpec, Spec, stands_at
from cascade_nodes.demo.reading import FoundObject, Reading, read

__all__ = ["FoundObject", "ObjectScore", "Reading", "Score", "read", "score", "summary"]

PLACE_SLACK = 0.05  # how far beyond its ninth of the frame an object may stand


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """Verdict on each stated attribute of one object; None where the prompt states nothing."""

    colour: bool | None
    shape: bool | None
    size: bool | None
    place: bool | None

    @property
    def verdicts(self) -> tuple[bool | None, ...]:
        return self.colour, self.shape, self.size, self.place


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict on everything that the prompt states; None where it states nothing."""

    objects: tuple[ObjectScore, ...]
    relation: bool | None
    background: bool | None
    count: bool | None  # no object missing and, for a full sentence, none too many
    absences: bool | None = None  # nothing that the prompt negates is in the picture

    @property
    def all_right(self) -> bool:
        verdicts = [self.relation, self.background, self.count, self.absences]
        verdicts += [value for o in self.objects for value in o.verdicts]
        return False not in verdicts


def score(reading: Reading, spec: Spec) -> Score:
    """Scores a picture against its prompt. The prompt's objects are matched with the picture's so that attributes
    agree best; the relation only breaks ties. A relation counts only between objects whose stated shape or colour is
    right.
    """
    stated, objects_found = spec.objects, reading.objects
    # None: the object is missing.
    choices = permutations([*objects_found, *[None] * len(stated)], len(stated))
    scored = [
        (_object_scores(stated, choice), _relation(stated, choice, spec.relation, reading.aspect))
        for choice in choices
    ]
    objects, relation = max(scored, key=lambda pair: (_agreement(pair[0]), pair[1] is True))
    background = None if spec.background is None else reading.background == spec.background
    right_count = len(objects_found) == len(stated) if spec.exact else len(objects_found) >= len(stated)
    there = any(_is_like(o, absent) for o in objects_found for absent in spec.absent)
    return Score(
        objects, relation, background, right_count if stated else None, not there if spec.absent else None
    )


def _is_like(found_object: FoundObject, spec: ObjectSpec) -> bool:
    """Whether an object has everything that is stated."""
    return False not in _object_score(spec, found_object).verdicts


def _object_scores(
    stated: tuple[ObjectSpec, ...], choice: tuple[FoundObject | None, ...]
) -> tuple[ObjectScore, ...]:
    return tuple(_object_score(spec, found_object) for spec, found_object in zip(stated, choice, strict=True))


def _object_score(spec: ObjectSpec, found_object: FoundObject | None) -> ObjectScore:
    if found_object is None:
        stated_values = (spec.colour, spec.shape, spec.size, spec.place)
        return ObjectScore(*(None if value is None else False for value in stated_values))
    return ObjectScore(
        None if spec.colour is None else found_object.colour == spec.colour,
        None if spec.shape is None else found_object.shape == spec.shape,
        None if spec.size is None else found_object.size == spec.size,
        None if spec.place is None else stands_at(found_object.x, found_object.y, spec.place, PLACE_SLACK),
    )


def _agreement(objects: tuple[ObjectScore, ...]) -> int:
    return sum(value is True for o in objects for value in o.verdicts)


def _relation(
    specs: tuple[ObjectSpec, ...],
    choice: tuple[FoundObject | None, ...],
    relation: str | None,
    aspect: float,
) -> bool | None:
    if relation is None:
        return None
    first, second, *_ = choice
    if first is None or second is None:
        return False
    for spec, found_object in zip(specs[:2], (first, second), strict=True):
        stated = _object_score(spec, found_object)
        if True not in (stated.shape, stated.colour) and False in (stated.shape, stated.colour):
            return False
    dx, dy = (second.x - first.x) * aspect, second.y - first.y
    apart, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return apart > abs(across)


def summary(scores: Iterable[Score]) -> dict[str, float]:
    """Rates of correct statements: objects_colour, objects_shape, objects_size, objects_place, relations,
    backgrounds, counts, absences, all_right (pictures right in everything). Only kinds of statements that some prompt
    makes.
    """
    scores = list(scores)
    objects = [o for s in scores for o in s.objects]
    values: dict[str, list[bool | None]] = {
        "objects_colour": [o.colour for o in objects],
        "objects_shape": [o.shape for o in objects],
        "objects_size": [o.size for o in objects],
        "objects_place": [o.place for o in objects],
        "relations": [s.relation for s in scores],
        "backgrounds": [s.background for s in scores],
        "counts": [s.count for s in scores],
        "absences": [s.absences for s in scores],
        "all_right": [s.all_right for s in scores],
    }
    stated = {name: [v for v in column if v is not None] for name, column in values.items()}
    return {name: sum(column) / len(column) for name, column in stated.items() if column}
