"""Language of the toy world: verbalises a spec (`verbalise`) and parses it back (`parse`).

`parse(verbalise(spec, rng)) == spec` for every spec that a caption states.
"""

import re
from dataclasses import replace
from random import Random

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.demo.words import (
    ANY_SHAPE,
    BACKGROUND_ADJECTIVES,
    BACKGROUND_NOUNS,
    COLOUR_WORDS,
    GROUND_WORDS,
    GROUNDS,
    JOINS,
    LEADS,
    NEGATIONS,
    NUMBERS,
    PLACES,
    RELATION_PLACES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    ObjectSpec,
    Spec,
    plural,
)

# Verbalising


def verbalise(spec: Spec, rng: Random) -> str:
    """Verbalises the spec in one of many ways; "" for an empty one."""
    text = _sentence(spec, rng) if spec.exact and spec.objects else _fragment(spec, rng)
    return _with_absences(text, spec.absent, rng) if spec.absent else text


def _bits(o: ObjectSpec, rng: Random) -> list[str]:
    """Adjectives of an object."""
    bits = []
    if o.size:
        bits.append(_some(SIZE_WORDS[o.size], rng))
    if o.colour:
        bits.append(_some(COLOUR_WORDS[o.colour], rng))
    return bits


def _some(words: tuple[str, ...], rng: Random) -> str:
    """Draws the plain word half of the time, else any of them."""
    chance = 2 * rng.random() - 1  # always one draw, so that a seed words two specs in the same way
    return words[0] if chance < 0 else words[int(chance * len(words))]


def _any(words: tuple[str, ...], rng: Random) -> str:
    return words[int(rng.random() * len(words))]


def _noun(o: ObjectSpec, rng: Random) -> str:
    return _some(SHAPE_WORDS[o.shape], rng) if o.shape else _any(ANY_SHAPE, rng)


def _with_article(words: str, rng: Random) -> str:
    if rng.random() < 0.06:
        return "one " + words
    return ("an " if words[0] in "aeiou" else "a ") + words


def _object(o: ObjectSpec, rng: Random) -> str:
    """Noun phrase with its article, such as "a small red star"."""
    phrase = _with_article(" ".join([*_bits(o, rng), _noun(o, rng)]), rng)
    return f"{phrase} {_some(PLACES[o.place], rng)}" if o.place else phrase


def _background(background: str, rng: Random) -> str:
    """Phrase for a background, such as "sand" or "a sandy backdrop"."""
    nouns = BACKGROUND_NOUNS[background]
    if rng.random() < 0.25:
        return _some(nouns, rng)
    name = _some(nouns + BACKGROUND_ADJECTIVES.get(background, ()), rng)
    return f"a {name} {_some(GROUND_WORDS, rng)}"


def _sentence(spec: Spec, rng: Random) -> str:
    form = rng.random()
    ground_first = form < 0.12 and spec.background is not None
    lead = "" if rng.random() < 0.5 or ground_first else _any(LEADS, rng) + " "
    if len(spec.objects) == 1:
        text = _object(spec.objects[0], rng)
    elif len(spec.objects) == 3:
        text = _three(spec.objects, spec.relation, not lead, rng)
    elif spec.relation is None:
        text = _unrelated(spec.objects[0], spec.objects[1], rng)
    else:
        text = _related(spec.objects[0], spec.objects[1], spec.relation, not lead, rng)
    text = lead + text
    if spec.background is None:
        return text
    ground = _background(spec.background, rng)
    if ground_first:
        return f"{_any(GROUNDS, rng)} {ground}, {text}"
    return f"{text}, {ground}" if form < 0.22 else f"{text} {_some(GROUNDS, rng)} {ground}"


def _unrelated(a: ObjectSpec, b: ObjectSpec, rng: Random) -> str:
    if a == b:  # "two red stars"
        return " ".join(["two", *_bits(a, rng), plural(_noun(a, rng))])
    return f"{_object(a, rng)} {_some(JOINS, rng)} {_object(b, rng)}"


def _three(objects: tuple[ObjectSpec, ...], relation: str | None, may_say_is: bool, rng: Random) -> str:
    """Three objects; a relation belongs to the first two, which may be named last."""
    a, b, c = objects
    if relation is None:
        if a == b == c:
            return " ".join([NUMBERS[3], *_bits(a, rng), plural(_noun(a, rng))])
        first = f"{_object(a, rng)}{' and' if rng.random() < 0.3 else ','}"
        return f"{first} {_object(b, rng)} {_some(JOINS, rng)} {_object(c, rng)}"
    verb = "is " if may_say_is and rng.random() < 0.15 else ""
    related = f"{_object(a, rng)} {verb}{_some(RELATION_WORDS[relation], rng)} {_object(b, rng)}"
    between = (", and ", " and ", ", ", " with ")[int(rng.random() * 4)]
    return (
        f"{related}{between}{_object(c, rng)}"
        if rng.random() < 0.7
        else f"{_object(c, rng)}{between}{related}"
    )


def _with_absences(text: str, absent: tuple[ObjectSpec, ...], rng: Random) -> str:
    """Adds "no red" or "without a circle" after a text or before it."""
    parts = []
    for o in absent:
        bits = _bits(o, rng)
        if o.shape or not bits or rng.random() < 0.3:
            noun = _noun(o, rng)
            bits.append(plural(noun) if rng.random() < 0.4 else noun)
        article = rng.random() < 0.4 and not bits[-1].endswith("s") and (o.shape is not None)
        phrase = " ".join(bits)
        parts.append(
            f"without {_with_article(phrase, rng) if article else phrase}"
            if rng.random() < 0.4
            else f"no {phrase}"
        )
    said = ", ".join(parts) if rng.random() < 0.7 else " and ".join(parts)
    if not text:
        return said
    if rng.random() < 0.15:
        return f"{said}, {text}"
    return f"{text}{' ' if said.startswith('without') and rng.random() < 0.6 else ', '}{said}"


def _related(a: ObjectSpec, b: ObjectSpec, relation: str, may_say_is: bool, rng: Random) -> str:
    if rng.random() < 0.15:  # "a red star on the left and a blue ring on the right"
        first_place, second_place = RELATION_PLACES[relation]
        return _unrelated(replace(a, place=first_place), replace(b, place=second_place), rng)
    verb = "is " if may_say_is and rng.random() < 0.15 else ""
    return f"{_object(a, rng)} {verb}{_some(RELATION_WORDS[relation], rng)} {_object(b, rng)}"


def _fragment(spec: Spec, rng: Random) -> str:
    """Tags without articles: "red", "something red", "red star, small, sand", "red star left of blue ring"."""
    tags = []
    if len(spec.objects) == 1:
        tags = _tags(spec.objects[0], rng)
    elif spec.objects:
        first, second, *others = (" ".join([*_bits(o, rng), _noun(o, rng)]) for o in spec.objects)
        joint = f" {_some(RELATION_WORDS[spec.relation], rng)} " if spec.relation else ", "
        tags = [first + joint + second, *others]
    if spec.background:
        noun = _some(BACKGROUND_NOUNS[spec.background], rng)
        ground = noun if rng.random() < 0.5 else f"{noun} {_some(GROUND_WORDS, rng)}"
        tags.insert(0 if rng.random() < 0.2 else len(tags), ground)
    return ", ".join(tags)


def _tags(o: ObjectSpec, rng: Random) -> list[str]:
    bits = _bits(o, rng)
    form = rng.random()
    if o.shape is None:
        if not bits:
            return [_any(ANY_SHAPE, rng)]
        bare = " ".join(bits)
        return [
            bare if form < 0.5 else f"something {bare}" if form < 0.8 else f"{bare} {_any(ANY_SHAPE, rng)}"
        ]
    bits.append(_noun(o, rng))
    if form < 0.6:
        return [" ".join(bits)]
    rng.shuffle(bits)
    return bits


# Parsing


def _lexicon() -> dict[str, tuple[str, str]]:
    """Maps phrases to (kind, meaning)."""
    lexicon = {
        "a": ("article", ""),
        "an": ("article", ""),
        "one": ("article", ""),
        "two": ("count", "2"),
        "three": ("count", "3"),
        "something": ("new", ""),
        "is": ("filler", ""),
        ",": ("comma", ""),
    }
    tables = {
        "size": SIZE_WORDS,
        "colour": COLOUR_WORDS,
        "shape": SHAPE_WORDS,
        "place": PLACES,
        "background": BACKGROUND_NOUNS,
        "relation": RELATION_WORDS,
    }
    for kind, table in tables.items():
        lexicon |= {word: (kind, name) for name, words in table.items() for word in words}
    lexicon |= {word: ("background", name) for name, words in BACKGROUND_ADJECTIVES.items() for word in words}
    lexicon |= {plural(word): ("shape", name) for name, words in SHAPE_WORDS.items() for word in words}
    lexicon |= {form: ("noun", "") for word in ANY_SHAPE for form in (word, plural(word))}
    lexicon |= dict.fromkeys(JOINS, ("new", ""))
    lexicon |= dict.fromkeys(NEGATIONS, ("negation", ""))
    return lexicon | dict.fromkeys(LEADS + GROUNDS + GROUND_WORDS, ("filler", ""))


_LEXICON = _lexicon()
_PHRASE = re.compile(
    r"(?:"
    + "|".join(re.escape(phrase) for phrase in sorted(_LEXICON, key=len, reverse=True))
    + r")(?!\w)|[^\s,]+"
)
_ATTRIBUTES = ("size", "colour", "shape")
_PAUSE, _SIGN = re.compile(r"\s[-/]\s|[.;:]\s"), re.compile(r"[^\w\s,]")


def vocabulary() -> set[str]:
    """Set of all words that a caption can contain, without punctuation."""
    return {word for phrase in _LEXICON for word in phrase.split() if word != ","}


def known_words() -> list[str]:
    """The vocabulary in an order for display: objects and attributes first."""
    names = [*SHAPE_WORDS, *COLOUR_WORDS, *SIZE_WORDS, *BACKGROUND_NOUNS, *RELATION_WORDS, *NEGATIONS]
    return list(dict.fromkeys([*names, *sorted(vocabulary())]))


def parse(prompt: str) -> Spec:
    """Parses a prompt into its spec. Punctuation has no meaning, except where it separates two parts, as a comma does.

    Raises CascadeError for a word outside the vocabulary, more than one relation, or more than three objects.
    """
    tokens = []
    plain = _SIGN.sub(" ", _PAUSE.sub(", ", prompt.lower().strip(" .,;:-")))
    for phrase in _PHRASE.findall(" ".join(plain.split())):
        if phrase not in _LEXICON:
            raise CascadeError(
                f"The toy world does not know {phrase!r} in the prompt {prompt!r}; "
                "use only words of cascade_nodes.demo.captions.vocabulary()."
            )
        tokens.append(_LEXICON[phrase])
    spec = _read(tokens, prompt)
    if len(spec.objects) > 3 or (spec.relation and len(spec.objects) < 2):
        raise CascadeError(
            f"The prompt {prompt!r} names {len(spec.objects)} objects; the toy world has one to three, "
            "and a relation needs two: name that many."
        )
    return spec


def _read(tokens: list[tuple[str, str]], prompt: str) -> Spec:
    reader = _Reader(prompt)
    for position, (kind, value) in enumerate(tokens):
        if kind in _ATTRIBUTES or kind == "noun":
            reader.describe(kind, value)
        elif reader.negated and reader.starts_object and kind in ("article", "background"):
            reader.negate(kind)
        else:
            reader.separate(kind, value, tokens[position + 1 :])
    return _places_as_relation(reader.spec())


class _Reader:
    """State of parsing a prompt."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.objects: list[dict[str, str]] = []
        self.times: list[int] = []  # of each object
        self.absent: list[dict[str, str]] = []
        self.relation: str | None = None
        self.background: str | None = None
        self.related_before = self.number = 1  # number of objects before the relation; of the next one
        self.starts_object, self.counted, self.exact, self.negated = True, False, False, False

    def describe(self, kind: str, value: str) -> None:
        """Assigns an attribute, or a noun without one, to the current object or the next."""
        named = self.absent if self.negated else self.objects
        if self.starts_object or (kind in _ATTRIBUTES and kind in named[-1]):
            named.append({})
            if not self.negated:
                self.times.append(self.number)
                self.exact |= self.counted
            self.number = 1
        self.starts_object = self.counted = False
        if kind in _ATTRIBUTES:
            named[-1][kind] = value

    def negate(self, kind: str) -> None:
        """Reads a negation, with the article of "without a circle"."""
        if kind == "background":
            raise CascadeError(
                f"The prompt {self.prompt!r} says what the background is not; say what it is: there is always one."
            )

    def separate(self, kind: str, value: str, following: list[tuple[str, str]]) -> None:
        """Reads a separator between objects."""
        if kind == "comma":
            self.starts_object |= (
                self.negated or not self.objects or not _continues(self.objects[-1], following)
            )
        elif kind == "relation":
            if self.relation:
                raise CascadeError(
                    f"The prompt {self.prompt!r} has two relations; the toy world has one: remove one."
                )
            self.relation, self.related_before, self.starts_object = value, len(self.objects), True
        elif kind == "place" and self.objects:
            self.objects[-1]["place"] = value
        elif kind == "background":
            self.background, self.starts_object, self.counted = value, True, False
        elif kind in ("article", "count", "new"):
            self.number = int(value) if kind == "count" else 1
            self.starts_object, self.counted = True, kind != "new"
        elif kind == "negation":
            self.starts_object = True
        self.negated = kind == "negation" or (self.negated and kind == "filler")

    def spec(self) -> Spec:
        counted = zip(self.objects, self.times, strict=True)
        objects = [ObjectSpec(**o) for o, count in counted for _ in range(count)]
        if self.related_before == 2 and len(objects) == 3:  # "a ring, and a star left of a cross"
            objects = [*objects[1:], objects[0]]
        absent = tuple(ObjectSpec(**o) for o in self.absent)
        return Spec(tuple(objects), self.relation, self.background, self.exact, absent)


def _continues(current: dict[str, str], following: list[tuple[str, str]]) -> bool:
    """Whether the tag after a comma is about the current object: "red star, small", not "red star, ring"."""
    for kind, _ in following:
        if kind not in _ATTRIBUTES:
            return kind in ("comma", "negation")
        if kind in current:
            return False
    return True


def _places_as_relation(spec: Spec) -> Spec:
    """Turns "one on the left and one on the right" into a relation."""
    if len(spec.objects) == 2 and spec.relation is None:
        first, second = spec.objects
        for relation, places in RELATION_PLACES.items():
            if (first.place, second.place) == places:
                bare = (replace(first, place=None), replace(second, place=None))
                return replace(spec, objects=bare, relation=relation)
    return spec
