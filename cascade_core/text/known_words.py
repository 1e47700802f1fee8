"""Words that a text encoder was taught, if its file states them, and unknown words of a prompt.

A small encoder, such as the demo's, accepts any text; so a prompt with a word that it was never taught gives a
picture of something else. Files of CLIP itself state no words, so all words count as known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from ..errors import quoted
from .foreign_syntax import BREAK, LORA
from .prompt_weights import parse_weights
from .tokenizer import learned_names

WORDS = "words"  # key in a safetensors header: a JSON list of words, the most helpful examples first
MOST_WORDS, LONGEST_WORD = 10_000, 64
SHOWN_UNKNOWN, SHOWN_KNOWN = 6, 29  # the latter: all names of things and attributes of the demo
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[\u2190-\u2bff\U0001f000-\U0001faff]+")  # "don't", an emoji
# The name of an embedding's file, and what another notice tells of.
_NO_WORDS = re.compile(rf"embedding:\s*\S+|{LORA.pattern}|{BREAK.pattern}")


def stated_words(metadata: Mapping[str, str] | None) -> tuple[str, ...]:
    """The words that a safetensors header states, in lower case; none for anything that is not a list of words."""
    try:
        words = json.loads((metadata or {}).get(WORDS) or "[]")
    except (ValueError, RecursionError):
        return ()
    if not isinstance(words, list) or len(words) > MOST_WORDS:
        return ()
    return tuple(word.lower() for word in words if isinstance(word, str) and 0 < len(word) <= LONGEST_WORD)


def unknown_words(prompt: str, words: Iterable[str], names: Iterable[str] = ()) -> list[str]:
    """Words of a prompt that are not in `words`, each once, in the prompt's spelling.

    names: those of learned tokens, such as "[loop]". Weights, embeddings, punctuation and other programs' syntax are
    not words.
    """
    learned = tuple(names)
    known, unknown = set(words), {}
    for text, _ in parse_weights(prompt):
        text = _NO_WORDS.sub(" ", text)
        for word in WORD.findall(learned_names(learned).sub(" ", text) if learned else text):
            if word.lower() not in known:
                unknown.setdefault(word.lower(), word)
    return list(unknown.values())


def describe_unknown_words(
    prompts: Iterable[str], words: Sequence[str], names: Iterable[str] = ()
) -> str | None:
    """A sentence about the words of prompts that an encoder was not taught, and some that it was; else None."""
    if not words:
        return None
    learned = tuple(names)
    unknown = list(
        dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt, words, learned))
    )
    if not unknown:
        return None
    shown = ", ".join(quoted(word, LONGEST_WORD) for word in unknown[:SHOWN_UNKNOWN])
    more = f" and {len(unknown) - SHOWN_UNKNOWN:,} more" if len(unknown) > SHOWN_UNKNOWN else ""
    some = ", ".join(quoted(word, LONGEST_WORD)[1:-1] for word in words[:SHOWN_KNOWN])
    rest = f" and {len(words) - SHOWN_KNOWN:,} more" if len(words) > SHOWN_KNOWN else ""
    return (
        f"The text encoder was never taught {shown}{more}, so the picture may show anything, unless a LoRA teaches "
        f"that; the words it knows are {some}{rest}."
    )
