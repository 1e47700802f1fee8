"""`cascade merge IN OUT --lora FILE …`: a Stage C, and a text encoder, with LoRAs baked into their weights.

Nothing heavy is imported before the command runs, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError, quoted
from .convert_lora import check_target

if TYPE_CHECKING:
    from ..cascade_core.adapters.apply import Patch
    from ..cascade_core.networks.config import StageCConfig

MERGED = "merged_loras"  # in the metadata of a merged file
# What a file says of its own contents, which is true no more.
_STALE = ("modelspec.hash_sha256", "sshash_legacy", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class Lora:
    """A LoRA to bake in, with its strengths as the node has them."""

    path: Path
    strength_model: float = 1.0
    strength_clip: float = 1.0


def add_merge_command(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="bake LoRAs into Stage C and the text encoder",
        description="Writes networks with LoRAs baked into their weights, in their own dtype and names, whole or not.",
    )
    merge.add_argument(
        "source", type=Path, metavar="IN", help="Stage C, or an all-in-one: a file or diffusers' folder"
    )
    merge.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    merge.add_argument(
        "--lora",
        action="append",
        nargs="+",
        required=True,
        metavar=("FILE", "STRENGTH"),
        help="a LoRA, its strength, and its strength for the text encoder (1; the same); may be repeated",
    )
    merge.add_argument(
        "--text-encoder", type=Path, metavar="FILE", help="the text encoder to bake them into too"
    )
    merge.add_argument("--text-output", type=Path, metavar="FILE", help="the file to write it to")
    one_file = "write Stage C and the text encoder into OUT, as an all-in-one in ComfyUI's names"
    merge.add_argument("--one-file", action="store_true", help=one_file)
    fp8 = "write Stage C's matrices in fp8 with a scale each, as ComfyUI reads it since 2025"
    merge.add_argument("--fp8", action="store_true", help=fp8)
    merge.add_argument("--alpha", type=float, default=0.0, metavar="NUMBER", help="as in convert-lora")
    merge.add_argument("--filters", default="", metavar="LIST", help="as in convert-lora")
    merge.add_argument("--force", action="store_true", help="overwrite what is there")
    merge.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    lines = merge(
        options.source,
        options.target,
        [_lora(words) for words in options.lora],
        options.text_encoder,
        options.text_output,
        options.one_file,
        options.fp8,
        options.alpha,
        options.filters,
        options.force,
    )
    for line in lines:
        print(line)
    return 0


def _lora(words: Sequence[str]) -> Lora:
    """FILE [STRENGTH [STRENGTH]]"""
    file, *numbers = words
    strengths = []
    for number in numbers[:2]:
        try:
            strengths.append(float(number))
        except ValueError:
            strengths.append(math.nan)
        if not abs(strengths[-1]) <= 1000:  # which NaN is not
            raise CascadeError(
                f"{quoted(number)} is not a strength; give a number such as 0.8 after --lora {file}."
            )
    if len(numbers) > 2:
        raise CascadeError(f"--lora {file} has {len(numbers)} strengths; give at most two, or --lora again.")
    model = strengths[0] if strengths else 1.0
    return Lora(Path(file), model, strengths[1] if len(strengths) > 1 else model)


def merge(
    source: Path,
    target: Path,
    loras: Sequence[Lora],
    text_encoder: Path | None = None,
    text_output: Path | None = None,
    one_file: bool = False,
    fp8: bool = False,
    alpha: float = 0.0,
    filters: str = "",
    force: bool = False,
) -> list[str]:
    """Writes the files and returns the lines of the report. Raises CascadeError, and writes nothing, on failure.

    text_encoder: to bake them into too, and text_output: where it is written to, if not into the same file (one_file);
    fp8: Stage C's matrices become fp8; alpha, filters: as in `read_adapter`.
    """
    import torch

    from ..cascade_core.adapters.merge import MergedFile
    from ..cascade_core.checkpoints import (
        check_weights,
        identify,
        read_named,
        split_attention,
        write_safetensors,
    )
    from ..cascade_core.checkpoints.layouts import SIGNATURES
    from ..cascade_core.networks.config import StageCConfig
    from ..cascade_core.networks.stage_c import StageC
    from ..cascade_core.text.clip import CLIP_TOKENS

    _check_outputs(target, text_encoder, text_output, one_file, force)
    model = read_named(source, "stage_c")
    weights = model.stored("stage_c") if "stage_c" in model.parts else model.tensors
    config = StageCConfig.from_dict(identify(source, weights, model.metadata, "stage_c")[1])
    with torch.device("meta"):
        check_weights(StageC(config), split_attention(weights))
    text = model if "text" in model.parts else None
    if text_encoder is not None:
        if text is not None:
            raise CascadeError(
                f"{source.name} holds a text encoder itself, which is merged too; leave --text-encoder out."
            )
        text = read_named(text_encoder, "text")
        if "text" not in text.parts:
            raise CascadeError(f"{text_encoder.name} holds no text encoder; choose one for --text-encoder.")
    lines, patches = _read_loras(loras, config, text is not None, alpha, filters)

    file = MergedFile()
    naming = _all_in_one if one_file else lambda part: None
    rest = file.add_network(model.tensors, model.parts["stage_c"], patches["stage_c"], naming("stage_c"), fp8)
    lines.append(f"Stage C: {file.changed} weights and biases change")
    text_file = MergedFile() if text_output is not None else file
    if text is not None:
        before = text_file.changed
        tensors = {name: model.tensors[name] for name in rest} if text is model else text.tensors
        left = text_file.add_network(tensors, text.parts["text"], patches["text"], naming("text"))
        lines.append(f"Text encoder: {text_file.changed - before} weights and biases change")
        rows = len(text.parts["text"].to_published(text.tensors)[SIGNATURES["text"]])
        if rows < CLIP_TOKENS:
            lines.append(
                f"Its vocabulary of {rows} tokens is its own: copy its vocab.json and merges.txt beside the new file."
            )
        rest = left if text is model else rest
    for name in rest:
        file.add(name, model.tensors[name])
    if not file.changed + text_file.changed:
        raise CascadeError("These LoRAs change nothing at these strengths; give others, or --text-encoder.")

    outputs = {target: (file, model.metadata)}
    if text is not None and text_output is not None:
        outputs[text_output] = (text_file, text.metadata)
    for path, (merged, metadata) in outputs.items():
        kept = _metadata(metadata, loras, one_file)
        write_safetensors(path, merged.tensors, kept, overwrite=force, value=merged.value)
        lines.append(f"Written: {path}")
    return lines


def _check_outputs(
    target: Path, text_encoder: Path | None, text_output: Path | None, one_file: bool, force: bool
) -> None:
    check_target(target, force)
    if text_encoder is None and (text_output is not None or one_file):
        raise CascadeError("There is no text encoder to write; name it with --text-encoder.")
    if text_encoder is not None and one_file == (text_output is not None):
        raise CascadeError(
            "Say where the text encoder goes: --text-output FILE, or --one-file for both in OUT."
        )
    if text_output is not None:
        check_target(text_output, force)
        if text_output.resolve() == target.resolve():
            raise CascadeError(
                f"{target} is to be both files; give --text-output another name, or --one-file."
            )


def _read_loras(
    loras: Sequence[Lora], config: StageCConfig, with_text: bool, alpha: float, filters: str
) -> tuple[list[str], dict[str, list[Patch]]]:
    """The lines that tell of the LoRAs, and their patches of each network."""
    from ..cascade_core import limits
    from ..cascade_core.adapters import (
        check_finite_changes,
        check_fits,
        describe_adapter,
        describe_unknown,
        read_adapter,
    )
    from ..cascade_core.adapters.apply import Patch

    alpha = limits.real_number("alpha", alpha, limits.ALPHA)
    lines: list[str] = []
    patches: dict[str, list[Patch]] = {"stage_c": [], "text": []}
    for lora in loras:
        adapter = read_adapter(lora.path, config, alpha, filters)
        check_fits(adapter, config)
        for changes in (adapter.stage_c, adapter.text):
            check_finite_changes(changes, adapter.name)
        unknown = describe_unknown(adapter)
        if unknown is not None:
            raise CascadeError(
                f"{unknown} Nothing was written; convert-lora --partial makes a LoRA of the rest."
            )
        strengths = f"strength {lora.strength_model:g}, of the text encoder {lora.strength_clip:g}"
        lines += [f"{describe_adapter(adapter)}; {strengths}", *adapter.notes]
        if adapter.text and lora.strength_clip and not with_text:
            lines.append(
                f"{adapter.name} changes the text encoder too, which is left as it is; --text-encoder merges it."
            )
        if adapter.tokens:
            lines.append(
                f"{adapter.name} teaches tokens, which no merged file holds; load it beside, with strength_model 0."
            )
        patches["stage_c"].append(Patch(adapter.name, adapter.stage_c, lora.strength_model))
        patches["text"].append(Patch(adapter.name, adapter.text, lora.strength_clip))
    return lines, patches


def _all_in_one(part: str) -> Callable[[str], str]:
    """Says what ComfyUI's all-in-one checkpoints call a tensor, of its published name."""
    from ..cascade_core.checkpoints import LAYOUTS
    from ..cascade_core.checkpoints.layouts import ALL_IN_ONE

    layouts = [layout for layout in LAYOUTS[part] if layout.name == ALL_IN_ONE]
    return next(layout for layout in layouts if not layout.transposed).their_name


def _metadata(metadata: Mapping[str, str], loras: Sequence[Lora], one_file: bool) -> dict[str, str]:
    """The file's own metadata, with what was merged; without a digest of what it was, and without a config where the
    file holds several networks.
    """
    stale = (*_STALE, "config") if one_file else _STALE
    try:
        before = json.loads(metadata.get(MERGED, "[]"))
    except (ValueError, RecursionError):
        before = []
    record = [
        {"file": lora.path.name, "strength_model": lora.strength_model, "strength_clip": lora.strength_clip}
        for lora in loras
    ]
    kept = {name: text for name, text in metadata.items() if name not in stale and text}
    return {**kept, MERGED: json.dumps([*(before if isinstance(before, list) else []), *record])}
