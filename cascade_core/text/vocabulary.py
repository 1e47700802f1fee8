"""Vocabularies in CLIP's format: the bundled one, small ones built from it, and their files.

A vocabulary is 256 bytes, the same 256 at a word's end, one token for each merge, and two special tokens,
last. So the merges determine it, and only `data/clip/merges.txt.gz` ships with the package. It is OpenAI's
`bpe_simple_vocab_16e6.txt.gz`, of which CLIP uses the first 48,894 merges, under its MIT licence.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import read_json, read_text
from ..errors import CascadeError, printable
from ..writing import write_file

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MOST_TOKENS = 10**7
MERGES_HEADER = "#version: 0.2"
# Pattern of one word in CLIP: the special tokens, English endings, letters, one digit, or punctuation.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Merges = list[tuple[str, str]]


@lru_cache(maxsize=1)
def bundled_vocabulary() -> tuple[dict[str, int], Merges]:
    """CLIP's 49,408 tokens and 48,894 merges. Read once; not to be written to."""
    packed = Path(__file__).parent / "data" / "merges.txt.gz"
    merges = _parse_merges(gzip.decompress(packed.read_bytes()).decode("utf-8"))
    return _number_tokens(merges), merges


def build_small_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], Merges]:
    """A vocabulary in which each of `words` is one token, `word</w>`; any other text splits into several.

    Holds CLIP's own merges as far as the words need them, in CLIP's order, and then further merges for words
    that CLIP itself leaves in pieces. Parts that CLIP never merges (`blue-green`, `don't`, two digits) become one
    token each.
    """
    full, clip_merges = bundled_vocabulary()
    backend = byte_pair_backend(full, clip_merges)
    parts = sorted({part for word in words for part in _split_words(backend, word)})
    rank = {pair: place for place, pair in enumerate(clip_merges)}
    needed = {pair for part in parts for pair in _merge(part, rank)[1]}
    merges = sorted(needed, key=rank.__getitem__)
    # Later merges rank lower than all before them, so a word once whole stays whole.
    rank = {pair: place for place, pair in enumerate(merges)}
    for part in parts:
        pieces, _ = _merge(part, rank)
        while len(pieces) > 1:
            rank[pieces[0], pieces[1]] = len(rank)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    merges = list(rank)
    return _number_tokens(merges), merges


def save_vocabulary(folder: str | Path, vocabulary: dict[str, int], merges: Merges) -> None:
    """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json`, which transformers reads too."""
    folder = Path(folder)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "model_max_length": 77,
    }
    lines = [MERGES_HEADER, *(" ".join(pair) for pair in merges)]
    write_file(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_file(folder / "merges.txt", "\n".join(lines) + "\n")
    write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def read_vocabulary(vocabulary: Path, merges: Path) -> tuple[dict[str, int], Merges]:
    """Reads `vocab.json` and `merges.txt`. Raises CascadeError where either does not have its format."""
    try:
        tokens = read_json(vocabulary)
        pairs = _parse_merges(read_text(merges))
    except CascadeError:
        raise
    except ValueError as error:  # a merge of other than two tokens
        raise CascadeError(
            f"{vocabulary} and {merges.name} are not a CLIP vocabulary ({printable(str(error))}); copy both again from "
            "where the text encoder came from."
        ) from error
    _check_numbers(tokens, vocabulary)
    return tokens, pairs


def read_tokenizer(path: Path) -> tuple[dict[str, int], Merges]:
    """The vocabulary and the merges of a `tokenizer.json`. Its regular expressions are not run; CLIP's are.

    Raises CascadeError for a tokenizer of another kind.
    """
    return tokenizer_table(read_json(path), path)


def tokenizer_table(content: Mapping[str, Any], path: Path) -> tuple[dict[str, int], Merges]:
    """The vocabulary and the merges in the content of a `tokenizer.json`.  path: where it is from, for messages"""
    try:
        tokens, merges = content["model"]["vocab"], content["model"]["merges"]
        pairs = [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]
        added = {entry["content"] for entry in content.get("added_tokens") or ()}
        whole = tokens.keys() >= added and all(isinstance(part, str) for pair in pairs for part in pair)
    except (AttributeError, KeyError, TypeError, ValueError):
        tokens, pairs, whole = {}, [], False
    if not whole:
        raise CascadeError(
            f"{path} is not a tokenizer of CLIP's kind (expected a model with vocab and merges, and no added tokens); "
            "copy it again from where the text encoder came from."
        )
    _check_numbers(tokens, path)
    return tokens, pairs


def _check_numbers(tokens: Mapping[str, Any], path: Path) -> None:
    if not all(type(number) is int and 0 <= number < MOST_TOKENS for number in tokens.values()):
        raise CascadeError(
            f"{path} does not number its tokens by whole numbers from 0 on; copy it again from where the text encoder "
            "came from."
        )


def byte_pair_backend(vocabulary: dict[str, int], merges: Merges) -> tokenizers.Tokenizer:
    """CLIP's pipeline over this vocabulary: NFC, one kind of space, lower case, words, bytes, merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        fuse_unk=False,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = [token for token in (START, END) if token in vocabulary]
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in special])
    return backend


def _split_words(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    """The parts of a text that merge apart, written in byte characters."""
    normalized = backend.normalizer.normalize_str(text)
    return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def _merge(part: str, rank: dict[tuple[str, str], int]) -> tuple[list[str], Merges]:
    """Byte-pair merging of one part: the pieces that remain, and the merges used, in order."""
    pieces = [*part[:-1], part[-1] + WORD_END]
    used = []
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces, used
        best = min(pairs, key=rank.__getitem__)
        used.append(best)
        merged, place = [], 0
        while place < len(pieces):
            step = 2 if tuple(pieces[place : place + 2]) == best else 1
            merged.append("".join(pieces[place : place + step]))
            place += step
        pieces = merged


def _number_tokens(merges: Merges) -> dict[str, int]:
    """Token -> id: byte characters, the same at a word's end, a token for each merge, start and end."""
    characters = _byte_characters()
    tokens = [*characters, *(c + WORD_END for c in characters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes: itself where it has one, else the next from U+0100 on.

    The order is the vocabulary's: printable bytes first.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def _parse_merges(text: str) -> Merges:
    """`merges.txt`: a header, then two tokens a line, the first merge first. ValueError for other lines."""
    merges = []
    for line in text.splitlines():
        if line and not line.startswith("#version"):
            left, right = line.split(" ")
            merges.append((left, right))
    return merges
