"""Spec of a prompt, and the words of the toy world, each with one meaning."""

from dataclasses import dataclass

from cascade_nodes.demo.scenes import COLOURS, SHAPES


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """Stated attributes of one object; None: not stated. `place` is one of PLACES."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """Content of a prompt. `relation`: position of the first object relative to the second. `exact`: these objects
    and no others, as in a full sentence; a fragment such as "red" is true wherever something is red. `absent`: no
    object is like any of these, as in "no red, without a circle".
    """

    objects: tuple[ObjectSpec, ...] = ()
    relation: str | None = None
    background: str | None = None
    exact: bool = False
    absent: tuple[ObjectSpec, ...] = ()


# Words. The first of each list is the plain one.

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "violet")}
SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "ring": ("ring", "donut", "hoop"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
}
ANY_SHAPE = ("object", "shape", "thing")
# Nouns stand alone ("on sand"), adjectives only before "background".
BACKGROUND_NOUNS = {
    "sky": ("sky",),
    "sand": ("sand",),
    "grass": ("grass", "mint"),
    "pink": ("pink",),
    "grey": ("grey", "gray"),
}
BACKGROUND_ADJECTIVES = {"sand": ("sandy", "beige"), "grass": ("grassy",)}
GROUND_WORDS = ("background", "backdrop")
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
PLACES = {
    "top left": ("in the top left", "in the top left corner", "at the top left"),
    "top": ("at the top",),
    "top right": ("in the top right", "in the top right corner", "at the top right"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "at the bottom left"),
    "bottom": ("at the bottom",),
    "bottom right": ("in the bottom right", "in the bottom right corner", "at the bottom right"),
}
RELATION_PLACES = {
    "left": ("left", "right"),
    "right": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
LEADS = (
    "a picture of",
    "a drawing of",
    "an image of",
    "a painting of",
    "there is",
    "draw",
    "show",
    "this is",
)
JOINS = ("and", "with")
GROUNDS = ("on", "against")
NEGATIONS = ("no", "without")
NUMBERS = {1: "one", 2: "two", 3: "three"}
# Meaningless punctuation: endings of captions, and replacements for a comma.
ENDS = (".", "!", "!!!", "...", "?", ";", " .", ":", ",", "!!", "-")
PAUSES = (", ", "; ", " - ", ". ", ": ", " / ", " , ")
QUOTES = ('"', "'", "*", "[]", "{}")


def plural(noun: str) -> str:
    return {"box": "boxes", "cross": "crosses", "plus": "pluses", "rhombus": "rhombuses"}.get(
        noun, noun + "s"
    )
