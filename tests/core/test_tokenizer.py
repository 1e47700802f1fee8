"""Prompt weights, tokens and chunks against ComfyUI's; the bundled vocabulary, and small ones."""

import gzip
import json
import os
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.text.prompt_weights import LONGEST_PROMPT, parse_weights
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary, save_vocabulary

GOLDEN = Path(__file__).parents[1] / "golden"
START, END = 49406, 49407


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.bundled()


@pytest.fixture
def small() -> Tokenizer:
    return Tokenizer.from_vocabulary(*build_small_vocabulary(["a", "large", "Red", "star", "turquoise"]))


def test_tokens_weights_and_chunks_are_comfyuis(bundled):
    prompts = json.loads(gzip.decompress((GOLDEN / "tokens.json.gz").read_bytes()))
    assert len(prompts) == 200
    for golden in prompts:
        chunks = bundled.chunks(golden["prompt"])
        # the golden file rounds weights, such as 1.1 * 1.1, to six places
        assert [[[token, round(weight, 6)] for token, weight in chunk] for chunk in chunks] == golden[
            "chunks"
        ]


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("", []),
        ("()", []),
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        ("((a:1.2) b:1.5)", [("a", 1.2), (" b", 1.5)]),  # an inner weight is not multiplied by the outer
        ("(a (b:0.5) c)", [("a ", 1.1), ("b", 0.5), (" c", 1.1)]),
        ("((a))", [("a", 1.1 * 1.1)]),
        ("(a:-1e-1)", [("a", -0.1)]),
        ("(:2)", [(":2", 1.1)]),  # a weight needs a text
        ("(a:b)", [("a:b", 1.1)]),
        (r"(a \(b\):1.5) \)", [("a (b)", 1.5), (" )", 1.0)]),
        ("a) (b:2) c", [("a) (b:2) c", 1.0)]),  # the second bracket makes up for the first
        ("a) (b (c:2)", [("a) (b ", 1.0), ("c", 2.0)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),  # never closed, yet it ends as a group does
    ],
)
def test_weights_of(prompt, segments):
    assert parse_weights(prompt) == segments


def test_brackets_may_nest_deeply():
    assert parse_weights("(" * 1200 + "cat" + ":1.5)" * 1200) == [("cat", 1.5)]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a" * (LONGEST_PROMPT + 1), "has 131,073 characters, but at most 131,072 are read"),
        ("(" * 40_000 + "cat" + ":1)" * 20_000, "brackets are nested too deeply"),
        ("(" * 30_000 + "cat" + ":1)" * 30_000, "brackets are nested too deeply"),
    ],
    ids=["long", "open", "closed"],
)
def test_prompts_that_would_take_minutes(prompt, words):
    with pytest.raises(CascadeError, match=words):
        parse_weights(prompt)


def test_brackets_that_are_never_closed_are_text():
    assert parse_weights("(" * 100_000) == [("(" * 100_000, 1.0)]
    assert parse_weights(")" * 100_000 + "(a)") == [(")" * 100_000 + "(a)", 1.0)]


@pytest.mark.parametrize(
    "prompt", ["(cat:nan)", "a (cat:inf) b", "(cat:1e99)", "(" * 999 + "cat" + ")" * 999]
)
def test_a_weight_must_be_finite(prompt):
    with pytest.raises(CascadeError, match="is not a finite number; write one such as"):
        parse_weights(prompt)


def test_bundled_vocabulary_is_clips(bundled):
    assert len(bundled) == 49408
    assert (bundled.start_token, bundled.end_token) == (START, END)
    assert bundled.tokens("a photo of a CAT") == [320, 1125, 539, 320, 2368]
    assert bundled.names([320, 2368, 0, 49408]) == ["a</w>", "cat</w>", "!", None]
    assert bundled.empty_chunk() == bundled.chunks("")[0] == [(START, 1.0)] + [(END, 1.0)] * 76


def test_a_prompt_of_ten_thousand_words(bundled):
    chunks = bundled.chunks("cat " * 10_000)
    assert len(chunks) == 134  # 75 words each
    assert {len(chunk) for chunk in chunks} == {77}
    assert sum(token == 2368 for chunk in chunks for token, _ in chunk) == 10_000


def test_chunk_borders(bundled):
    seventy = "cat " * 70
    # seven tokens under one weight move on together, eight are cut
    first, second = bundled.chunks(seventy + "(" + "dog " * 7 + ":1.5)")
    assert first[71:] == [(END, 1.0)] * 6
    assert second[1:9] == [(1929, 1.5)] * 7 + [(END, 1.0)]
    first, second = bundled.chunks(seventy + "(" + "dog " * 8 + ":1.5)")
    assert first[71:] == [(1929, 1.5)] * 5 + [(END, 1.0)]
    assert second[1:5] == [(1929, 1.5)] * 3 + [(END, 1.0)]


def test_small_vocabulary_holds_each_word_as_one_token():
    words = [
        "a",
        "the",
        "left",
        "Crescent",
        "turquoise",
        "octahedron",
        "xyzzyx",
        "zzyx",
        "café",
        "blue-green",
        "漢字",
    ]
    vocabulary, merges = build_small_vocabulary(words)
    tokenizer = Tokenizer.from_vocabulary(vocabulary, merges)
    for word in words:
        names = tokenizer.names(tokenizer.tokens(word))
        parts = ["blue", "-", "green"] if word == "blue-green" else [word.lower()]
        assert [(name or "").endswith("</w>") for name in names] == [True] * len(parts)
        if word.isascii():
            assert names == [part + "</w>" for part in parts]
    assert len(vocabulary) == len(tokenizer) == 512 + len({"".join(pair) for pair in merges}) + 2
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.end_token == len(vocabulary) - 1


def test_small_vocabulary_is_clips_in_little(bundled, small):
    """What a small vocabulary does not know falls into bytes, and nothing into the unknown token."""
    assert small.names(small.tokens("A RED star")) == bundled.names(bundled.tokens("a red star"))
    assert small.names(small.tokens("zq")) == ["z", "q</w>"]
    assert small.end_token not in small.tokens("zebra 漢 🐱 \x00")
    assert small.chunks("a (star:1.3)")[0][:4] == [
        (small.start_token, 1.0),
        (small.tokens("a")[0], 1.0),
        (small.tokens("star")[0], 1.3),
        (small.end_token, 1.0),
    ]


def test_saved_vocabulary_is_read_back_and_by_transformers(small, tmp_path):
    vocabulary, merges = build_small_vocabulary(["a", "large", "Red", "star", "turquoise"])
    save_vocabulary(tmp_path / "new", vocabulary, merges)
    prompt = "a large (red:1.2) star, zebra 漢"
    assert Tokenizer.from_folder(tmp_path / "new").chunks(prompt) == small.chunks(prompt)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "new")
    assert theirs("a large red star, zebra 漢")["input_ids"][1:-1] == small.tokens(
        "a large red star, zebra 漢"
    )


def test_tokenizer_json_is_read_without_its_padding(small, tmp_path):
    small.backend.enable_padding(length=9)
    small.backend.enable_truncation(3)
    small.backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.names(tokenizer.tokens("a large red star")) == [
        "a</w>",
        "large</w>",
        "red</w>",
        "star</w>",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer; expected vocab.json and merges.txt"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json is not JSON with a table"),
        ({"vocab.json": "[]", "merges.txt": ""}, "is not JSON with a table"),
        ({"vocab.json": "{}", "merges.txt": "a b c"}, "are not a CLIP vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "b c"}, "merges do not fit its vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, r"lacks <\|startoftext\|>"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not a tokenizer"),
        (
            {"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": [5]}}'},
            "tokenizer.json is not a tokenizer",
        ),
        (
            {
                "tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{"content": "b"}]}'
            },
            "and no added tokens",
        ),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, "does not number its tokens by whole numbers"),
        ({"vocab.json": '{"a": 1e99}', "merges.txt": ""}, "does not number its tokens by whole numbers"),
        ({"vocab.json": '{"a": 99999999}', "merges.txt": ""}, "does not number its tokens by whole numbers"),
    ],
)
def test_broken_tokenizer_files(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CascadeError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_patterns_of_a_tokenizer_json_are_not_run(small, tmp_path):
    """The file's own normaliser and splitter would run for years: only its vocabulary and merges are taken."""
    small.backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    years = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}
    content["pre_tokenizer"] = years
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    read = Tokenizer.from_folder(tmp_path)
    text = "a red star " + "a" * 40 + "b"
    assert read.tokens(text) == small.tokens(text)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_texts_that_never_end(name, tmp_path):
    if name != "tokenizer.json":
        (tmp_path / "vocab.json").write_text("{}")
        (tmp_path / "merges.txt").write_text("")
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(CascadeError, match="has more than the 25000000 bytes that are read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CascadeError, match="holds no tokenizer"):
        Tokenizer.from_folder(tmp_path)
