"""Syntax of other programs is named, and nothing else is taken for it."""

import pytest

from cascade_nodes.cascade_core.text.foreign_syntax import ADVICE, describe_syntax, foreign_syntax


@pytest.mark.parametrize(
    ("prompt", "kind", "text"),
    [
        ("a cat <lora:style:0.8>, photograph", "lora", "<lora:style:0.8>"),
        ("a cat <lyco:x>", "lora", "<lyco:x>"),
        ("a cat BREAK a dog", "break", "BREAK"),
        ("a [cat:dog:0.5] on grass", "schedule", "[cat:dog:0.5]"),
        ("a [cat::12] on grass", "schedule", "[cat::12]"),
        ("a [cat: .5 ]", "schedule", "[cat: .5 ]"),
        ("a {cat|dog}", "choice", "{cat|dog}"),
        ("a [cat|dog]", "choice", "[cat|dog]"),
    ],
)
def test_it_is_named_with_what_to_do_instead(prompt, kind, text):
    assert foreign_syntax(prompt) == [(kind, text)]
    sentence = describe_syntax(prompt)
    assert sentence is not None
    assert text in sentence
    assert sentence.endswith(f"{ADVICE[kind]}.")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a (cat:1.3) [fernando]",
        "a < b > c",
        "breakfast, a break",
        "time: [12:30 pm]",
        "{one}",
        "[a",
        "a | b",
        "<lora:x",
    ],
)
def test_plain_prompts_are_left_alone(prompt):
    assert foreign_syntax(prompt) == []
    assert describe_syntax(prompt) is None


def test_each_kind_once_and_a_long_piece_cut():
    prompt = "<lora:a:1> <lora:b:1> {x|y} BREAK {z|w} " + f"[{'a' * 5000}:b:0.5]"
    assert [piece.kind for piece in foreign_syntax(prompt)] == ["lora", "break", "schedule", "choice"]
    assert len(describe_syntax(prompt) or "") < 4 * 500


@pytest.mark.parametrize("unit", ["<lora:", "[", "{", "[a:1", "{a|", "BREAK", "[::1"])
def test_hostile_prompts_take_no_longer_than_they_are_long(unit):
    assert foreign_syntax(unit * 200_000) == []
