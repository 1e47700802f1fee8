"""Notices about prompts with words that the text encoder was not trained on, or with other programs' syntax."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import nodes
from cascade_nodes.cascade_core.adapters import Adapter
from cascade_nodes.cascade_core.adapters.adapter import LearnedToken
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.demo.captions import known_words
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts import comfyui


class Told(logging.Handler):
    """Sentences about words of the log."""

    def __init__(self):
        super().__init__()
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "never taught" in record.getMessage():
            self.sentences.append(record.getMessage())


def told(work: Callable[[], object]) -> list[str]:
    handler, log = Told(), logging.getLogger()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        work()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return handler.sentences


def told_of_syntax(work: Callable[[], object]) -> list[tuple[str, bool]]:
    """Each notice of the tokenizer, and whether a panel shows it too."""
    notices: list[tuple[str, bool]] = []
    with patch.object(comfyui.clip, "notify", lambda text, in_panel=False: notices.append((text, in_panel))):
        work()
    return notices


def measure() -> dict[str, list]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "encoder"
        shutil.copytree(WEIGHTS / "demo_text_encoder", folder)
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        path = folder / "model.safetensors"
        write_safetensors(path, tensors, {**metadata, "words": json.dumps(known_words())})
        clip = comfyui.load_text_encoder(folder)
        write_safetensors(path, tensors, {k: v for k, v in metadata.items() if k != "words"})
        silent = comfyui.load_text_encoder(folder)
    encode = nodes.CLIPTextEncode().encode
    loop = LearnedToken("[loop]", torch.zeros(2, 192))
    house = Adapter("house", "kohya", metadata={"modelspec.trigger_phrase": "house"})
    named, taught, both, untaught = (
        comfyui.with_adapter(None, clip, adapter, 0.0, 1.0, ())[1]
        for adapter in (
            Adapter("loop", "kohya", tokens=(loop,)),
            house,
            replace(house, tokens=(loop,)),
            replace(house, metadata={}),
        )
    )
    again = comfyui.with_adapter(None, named, house, 0.0, 1.0, ())[1]
    return {
        "known": told(lambda: CascadeTextEncode.execute(clip, "a red star, no (circle:1.2)!!!", "")),
        "ours": told(lambda: CascadeTextEncode.execute(clip, "a red dog", "a red star")),
        "theirs": told(lambda: encode(clip, "a red dog")),
        "unlearned": told(lambda: encode(clip, "a [loop] on grass")),
        "learned": told(lambda: encode(named, "a [loop] on grass")),
        "untaught": told(lambda: encode(untaught, "a red house")),
        "taught": [
            *told(lambda: encode(taught, "a red house")),
            *told(lambda: encode(both, "a red house, a [loop]")),
            *told(lambda: encode(again, "a red house, a [loop]")),
        ],
        "without words": told(lambda: encode(silent, "a lighthouse in a storm")),
        "syntax, ours": told_of_syntax(lambda: CascadeTextEncode.execute(silent, "a <lora:x:0.8> BREAK", "")),
        "syntax, theirs": told_of_syntax(lambda: encode(silent, "a <lora:x:0.8> BREAK")),
        "no syntax": told_of_syntax(lambda: encode(silent, "a (red:1.2) star")),
    }
