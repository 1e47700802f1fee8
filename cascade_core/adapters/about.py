"""Training facts in a LoRA file's metadata: trigger words, base model, rank, licence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import printable
from ..text.known_words import WORD
from .adapter import Adapter
from .compatibility import describe_adapter, describe_unknown, listed

# Each fact with its metadata keys, of which the first present one counts: those of Stability AI's ModelSpec, which
# kohya and OneTrainer write, before kohya's own.
_ENTRIES = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "trigger words": ("modelspec.trigger_phrase", "trigger_words", "instance_prompt"),
    "use": ("modelspec.usage_hint",),
    "base model": ("modelspec.architecture", "ss_base_model_version"),
    "trained on": ("ss_sd_model_name", "base_model"),
    "rank": ("ss_network_dim",),
    "alpha": ("ss_network_alpha",),
    "licence": ("modelspec.license", "license"),
}
_FREQUENT_TAGS = 5
_MOST_TRIGGERS = 2000  # characters
_LONGEST = 120  # characters of a value that are shown


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """{fact: its printable value} from a file's metadata, the most important first."""
    facts = {}
    for fact, names in _ENTRIES.items():
        stated = (metadata.get(name, "").strip() for name in names)
        value = next((text for text in stated if text and text != "None"), "")
        if value:
            facts[fact] = printable(value, _LONGEST)
    tags = frequent_tags(metadata.get("ss_tag_frequency", ""))
    if tags and "trigger words" not in facts:
        facts["frequent in its captions"] = listed(tags, _FREQUENT_TAGS)
    return facts


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The file's trigger words, in lower case: those that a prompt needs to ask for what it teaches."""
    stated = next((text for name in _ENTRIES["trigger words"] if (text := metadata.get(name, ""))), "")
    return tuple(WORD.findall(stated[:_MOST_TRIGGERS].lower()))


def frequent_tags(text: str) -> list[str]:
    """The tags of kohya's `ss_tag_frequency`, {folder: {tag: count}}, the most frequent first; [] for anything else."""
    try:
        folders: Any = json.loads(text)
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and tag.strip():
                counts[tag.strip()] += count
    return [printable(tag, _LONGEST) for tag, _ in counts.most_common(_FREQUENT_TAGS + 1)]


def describe_training(name: str, metadata: Mapping[str, str]) -> str | None:
    """A file's training facts in a sentence; None if it states none."""
    stated = "; ".join(f"{fact} {value}" for fact, value in training_facts(metadata).items())
    return f"{name} says of itself: {stated}." if stated else None


def describe_notes(adapter: Adapter) -> list[str]:
    """Sentences about assumptions made in reading a file, and about its tensors that are left out."""
    return [note for note in (*adapter.notes, describe_unknown(adapter)) if note]


def describe_file(adapter: Adapter) -> list[str]:
    """Lines about a LoRA file: its contents, its stated training, and the assumptions made in reading it."""
    training = describe_training(adapter.name, adapter.metadata)
    return [describe_adapter(adapter), *([training] if training else []), *describe_notes(adapter)]
