"""Odd texts, numbers and structures, to be put where something else is expected."""

from __future__ import annotations

from random import Random
from typing import Any

TEXTS = (
    "", " ", ".", "..", "/", "\0", "a\0b", "\n", "a\nb\r\nc", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07",
    "\x9b2J", "\ud800",
    "caf\udce9", "\u202egnp.exe", "\u2028", "\ufeff", "\uffff", "𝒳" * 50, "é" * 300, "name" * 100, "%s%n%x",
    "{}", "{0.__class__}",
    "${HOME}", "$(id)", "`id`", "null", "None", "nan", "inf", "-inf", "NaN", "1e400", "0x10", "1_000", "١٢٣",
    "true", "[1", "{'a': 1}",
    "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/null", "/dev/zero", "/proc/self/mem", "~", "~root",
    "C:\\x", "a\\b", "con",
    "CON.png", "a/b/c", "a//b", "a/./b", "-rf", "--help", ".hidden", "x.", "x ", "*", "[!a]", "a" * 256,
    "/" * 5000, "%year%", "%width%",
    "%date:yyyy-MM-dd%", "%Node.input%", "%" * 1000, "<script>", "';--", "(a:inf)", "embedding:gone",
)  # fmt: skip

NUMBERS = (
    0, -1, 1, 2, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**5000, 0.0, -0.0, 0.5, 1e-300,
        5e-324, 1e300, -1e300,
    float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip


def odd_text(random: Random) -> str:
    text = random.choice(TEXTS)
    if random.random() < 0.2:
        text = text + random.choice(TEXTS)
    if random.random() < 0.05:
        text = (text or "a ") * (1_000_000 // max(1, len(text)) + 1)
    return text


def odd_number(random: Random) -> Any:
    return random.choice(NUMBERS) if random.random() < 0.8 else random.randint(-(2**66), 2**66)


def odd_structure(random: Random) -> Any:
    """A list or an object, at times nested deeper than Python follows."""
    deep: Any = odd_value(random, 0.0)
    for _ in range(random.choice((1, 1, 2, 5, 60, 400, 3000))):
        deep = [deep] if random.random() < 0.5 else {random.choice(("a", "__value__", "", "__type__")): deep}
    flat = [odd_value(random, 0.0) for _ in range(random.randint(0, 5))]
    pairs = {str(index): value for index, value in enumerate(flat)}
    return random.choice((deep, deep, flat, pairs, [], {}, [flat] * 50, ["x"] * 10_000))


def odd_value(random: Random, structures: float = 0.3) -> Any:
    if random.random() < structures:
        return odd_structure(random)
    return random.choice((odd_text, odd_text, odd_number, lambda _: None))(random)
