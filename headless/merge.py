"""`cascade merge IN OUT --lora FILE …`: a Stage C, and a text encoder, with LoRAs baked into their weights.

Nothing heavy is imported before the command runs, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError, quoted
from .convert_lora import check_target

if TYPE_CHECKING:
    from ..cascade_core.adapters.apply import Patch
    from ..cascade_core.checkpoints.source import NamedTensors
    from ..cascade_core.networks.config import StageCConfig

MERGED = "merged_loras"  # in the metadata of a merged file
# Metadata about the file's contents that merging invalidates.
_STALE = ("modelspec.hash_sha256", "sshash_legacy", "sshs_model_hash", "sshs_legacy_hash")
_ONE_NETWORK = ("kind", "config")  # metadata of a file with one network


@dataclass(frozen=True)
class Lora:
    """A LoRA to bake in, with its strengths as the node has them."""

    path: Path
    strength_model: float = 1.0
    strength_clip: float = 1.0


@dataclass(frozen=True)
class Merge:
    """Arguments of a merge.

    source         Stage C, or an all-in-one
    text_encoder   to bake the LoRAs into too, where the source holds none
    text_output    the text encoder's own file; one_file: it is written into the target
    fp8, int8      format of Stage C's large matrices, with scales
    alpha          and filters: as in `read_adapter`
    force          overwrite what is there
    """

    source: Path
    target: Path
    loras: Sequence[Lora]
    text_encoder: Path | None = None
    text_output: Path | None = None
    one_file: bool = False
    fp8: bool = False
    int8: bool = False
    alpha: float = 0.0
    filters: str = ""
    force: bool = False


class CommandParser(argparse.ArgumentParser):
    """Parser of a command whose words may stand anywhere.

    argparse alone would read IN and OUT as strengths of a LoRA, and refuse positional words on both sides of an option.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(_loras_last(list(args or ())), namespace)
        names = [
            entry.dest for entry in self._actions if not entry.option_strings and entry.nargs in ("*", "+")
        ]
        if names and not any(word.startswith("-") for word in unknown):
            setattr(namespace, names[0], [*getattr(namespace, names[0]), *unknown])
        elif unknown:  # reported here, with this command's usage
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, []


def _loras_last(words: list[str]) -> list[str]:
    """The words, with every `--lora FILE [STRENGTH [STRENGTH]]` moved to the end."""
    words = [
        part for word in words for part in (word.split("=", 1) if word.startswith("--lora=") else [word])
    ]
    if "--" in words:
        return words
    others, loras = [], []
    while words:
        count = 1
        if words[0] == "--lora":
            count = 2 + sum(1 for _ in takewhile(_is_number, words[2:]))
        (loras if count > 1 else others).extend(words[:count])
        del words[:count]
    return [*others, *loras]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def add_merge_command(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="bake LoRAs into Stage C and the text encoder",
        description="Writes networks with LoRAs baked into their weights, in their own dtype and names, or nothing.",
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
        help="a LoRA, its strength, and its strength for the text encoder (1; the first's); may be repeated",
    )
    merge.add_argument(
        "--text-encoder", type=Path, metavar="FILE", help="the text encoder to bake them into too"
    )
    merge.add_argument("--text-output", type=Path, metavar="FILE", help="the file to write it to")
    one_file = "write Stage C and the text encoder into OUT, as an all-in-one in ComfyUI's names"
    merge.add_argument("--one-file", action="store_true", help=one_file)
    eight_bit = merge.add_mutually_exclusive_group()
    fp8 = "write Stage C's large matrices in fp8 with a scale each, as ComfyUI reads it since 2025"
    eight_bit.add_argument("--fp8", action="store_true", help=fp8)
    int8 = "write them in int8 with a scale for each row, as ComfyUI reads it since 2026"
    eight_bit.add_argument("--int8", action="store_true", help=int8)
    merge.add_argument("--alpha", type=float, default=0.0, metavar="NUMBER", help="as in convert-lora")
    merge.add_argument("--filters", default="", metavar="LIST", help="as in convert-lora")
    merge.add_argument("--force", action="store_true", help="overwrite what is there")
    merge.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    merge.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    names = [entry.name for entry in fields(Merge) if entry.name != "loras"]
    job = Merge(
        loras=[_lora(words) for words in options.lora],
        **{name: getattr(options, name) for name in names},
    )
    for line in merge(job):
        print(line)
    return 0


def _lora(words: Sequence[str]) -> Lora:
    """Reads FILE [STRENGTH [STRENGTH]]."""
    file, *numbers = words
    strengths = [float(number) if _is_number(number) else math.nan for number in numbers[:2]]
    for number, strength in zip(numbers, strengths, strict=False):
        if not abs(strength) <= 1000:  # also true for NaN
            raise CascadeError(
                f"{quoted(number)} is not a strength; give a number such as 0.8 after --lora {file}."
            )
    if len(numbers) > 2:
        raise CascadeError(f"--lora {file} has {len(numbers)} strengths; give at most two, or --lora again.")
    model = strengths[0] if strengths else 1.0
    return Lora(Path(file), model, strengths[1] if len(strengths) > 1 else model)


def merge(job: Merge) -> list[str]:
    """Writes the files and returns the lines of the report. Raises CascadeError, and writes nothing, on failure."""
    from ..cascade_core.adapters.merge import EightBit, MergedFile
    from ..cascade_core.checkpoints import write_safetensors
    from ..cascade_core.checkpoints.layouts import all_in_one_name
    from ..cascade_core.checkpoints.quantised import without_stated
    from ..cascade_core.networks.quantisation import E4M3, INT8

    _check_outputs(job)
    model, config, matrices = _read_stage_c(job.source)
    text = _read_text_encoder(job, model)
    lines, patches = _read_loras(job, config, text is not None)

    file = MergedFile()
    text_file = MergedFile() if job.text_output is not None else file
    stage_c_name, text_name = (
        partial(all_in_one_name, part) if job.one_file else None for part in ("stage_c", "text")
    )
    eight_bit = EightBit(E4M3 if job.fp8 else INT8 if job.int8 else None, matrices)
    rest = file.add_network(
        model.tensors, model.parts["stage_c"], patches["stage_c"], stage_c_name, eight_bit
    )
    changed = file.changed
    lines.append(f"Stage C: {changed} weights and biases change")
    if text is not None:
        tensors = {name: model.tensors[name] for name in rest} if text is model else text.tensors
        left = text_file.add_network(tensors, text.parts["text"], patches["text"], text_name)
        rest = left if text is model else rest
        text_changed = text_file.changed - (changed if text_file is file else 0)
        lines += [f"Text encoder: {text_changed} weights and biases change", *_vocabulary_lines(text)]
        changed += text_changed
    for name in rest:
        file.add(name, model.tensors[name])
    if not changed:
        advice = ", or --text-encoder" if text is None and patches["text"] else ""
        raise CascadeError(f"These LoRAs change nothing at these strengths; give others{advice}.")

    outputs = {job.target: (file, model.metadata)}
    if text is not None and job.text_output is not None:
        outputs[job.text_output] = (text_file, text.metadata)
    for path, (merged, metadata) in outputs.items():
        kept = without_stated(_metadata(metadata, job), merged.tensors)
        write_safetensors(path, merged.tensors, kept, overwrite=job.force, value=merged.value)
        lines.append(f"Written: {path}")
    return lines


def _check_outputs(job: Merge) -> None:
    check_target(job.target, job.force)
    if job.one_file and job.text_output is not None:
        raise CascadeError(
            "--text-output and --one-file are two places for the text encoder; give one of them."
        )
    if job.text_encoder is not None and not (job.one_file or job.text_output):
        raise CascadeError(
            "Say where the text encoder goes: --text-output FILE, or --one-file for both in OUT."
        )
    if job.text_output is not None:
        check_target(job.text_output, job.force)
        if job.text_output.resolve() == job.target.resolve():
            raise CascadeError(
                f"{job.target} is to be both files; give --text-output another name, or --one-file in its place."
            )


def _read_stage_c(source: Path) -> tuple[NamedTensors, StageCConfig, set[str]]:
    """The file, the network's configuration, and the names of matrices that can be stored in 8 bits."""
    import torch

    from ..cascade_core.checkpoints import check_weights, identify, read_named, split_attention
    from ..cascade_core.networks.config import StageCConfig
    from ..cascade_core.networks.quantisation import quantisable
    from ..cascade_core.networks.stage_c import StageC

    model = read_named(source, "stage_c")
    weights = model.stored("stage_c") if "stage_c" in model.parts else model.tensors
    config = StageCConfig.from_dict(identify(source, weights, model.metadata, "stage_c")[1])
    with torch.device("meta"):
        network = StageC(config)
    check_weights(network, split_attention(weights))
    matrices = {f"{name}.weight" for name, layer in quantisable(network) if layer.weight.ndim == 2}
    return model, config, matrices


def _read_text_encoder(job: Merge, model: NamedTensors) -> NamedTensors | None:
    """The text encoder in the source, or in the file given by --text-encoder; None without either."""
    from ..cascade_core.checkpoints import read_named

    if job.text_encoder is None:
        if "text" in model.parts:
            return model
        if job.one_file or job.text_output is not None:
            option = "--one-file" if job.one_file else "--text-output"
            raise CascadeError(
                f"{job.source.name} holds no text encoder to write; name one with --text-encoder, or leave {option} "
                "out."
            )
        return None
    if "text" in model.parts:
        raise CascadeError(
            f"{job.source.name} holds a text encoder itself, which is merged too; leave --text-encoder out."
        )
    text = read_named(job.text_encoder, "text")
    if "text" not in text.parts:
        raise CascadeError(f"{job.text_encoder.name} holds no text encoder; choose one for --text-encoder.")
    return text


def _vocabulary_lines(text: NamedTensors) -> list[str]:
    from ..cascade_core.checkpoints.layouts import SIGNATURES
    from ..cascade_core.text.clip import CLIP_TOKENS

    rows = len(text.parts["text"].to_published(text.tensors)[SIGNATURES["text"]])
    if rows >= CLIP_TOKENS:
        return []
    return [
        f"Its vocabulary of {rows} tokens is its own: copy its vocab.json and merges.txt beside the new file."
    ]


def _read_loras(
    job: Merge, config: StageCConfig, with_text: bool
) -> tuple[list[str], dict[str, list[Patch]]]:
    """Report lines about the LoRAs, and their patches by network."""
    from ..cascade_core import limits
    from ..cascade_core.adapters import (
        check_finite_adapter,
        check_fits,
        describe_adapter,
        describe_unknown,
        read_adapter,
    )
    from ..cascade_core.adapters.apply import Patch

    alpha = limits.real_number("alpha", job.alpha, limits.ALPHA)
    lines: list[str] = []
    patches: dict[str, list[Patch]] = {"stage_c": [], "text": []}
    for lora in job.loras:
        adapter = read_adapter(lora.path, config, alpha, job.filters)
        check_fits(adapter, config)  # also checks that it is for Stage C
        check_finite_adapter(adapter)
        if not (adapter.stage_c or adapter.text):
            raise CascadeError(
                f"{adapter.name} teaches tokens alone, which no merged file holds; leave it out here and load it "
                "beside the merged file, by Cascade LoRA Apply or add_lora."
            )
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
        if adapter.text:
            patches["text"].append(Patch(adapter.name, adapter.text, lora.strength_clip))
    return lines, patches


def _metadata(metadata: Mapping[str, str], job: Merge) -> dict[str, str]:
    """The file's metadata with a record of the merge, without digests of the old contents and, for a file of several
    networks, without the metadata of a single one.
    """
    stale = (*_STALE, *_ONE_NETWORK) if job.one_file else _STALE
    try:
        before = json.loads(metadata.get(MERGED, "[]"))
    except (ValueError, RecursionError):
        before = []
    record = [
        {"file": lora.path.name, "strength_model": lora.strength_model, "strength_clip": lora.strength_clip}
        for lora in job.loras
    ]
    kept = {name: text for name, text in metadata.items() if name not in stale and text}
    return {**kept, MERGED: json.dumps([*(before if isinstance(before, list) else []), *record])}
