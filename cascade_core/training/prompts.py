"""Prompts of the sample pictures that a run makes, from the settings or from a separate file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CascadeError, printable, quoted
from .settings import OutputSettings, SamplePrompt, Settings, check_prompt_count
from .typed_yaml import build, read_text, read_yaml

# Options at a line's end, as in kohya's scripts: "a star --n blurry --w 512 --h 768 --d 7 --s 20 --l 4".
OPTIONS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "cfg"}
_OPTION = re.compile(r"\s--([a-z])\s+")


@dataclass(frozen=True)
class PromptFile:
    prompts: tuple[str | SamplePrompt, ...]


def with_prompts_of_file(output: OutputSettings) -> OutputSettings:
    """The settings with the prompts of `prompts_file` after their own, read now. Raises CascadeError."""
    if output.prompts_file is None:
        return output
    path = Path(output.prompts_file)
    prompts = [*output.prompts, *read_prompts(path)]
    check_prompt_count(prompts, str(path))
    return replace(output, prompts=tuple(prompts))


def read_prompts(path: Path) -> list[str | SamplePrompt]:
    """Reads a file: YAML or JSON with the key `prompts`, each as in the settings; or a text, one prompt a line.

    In a text, empty lines and lines beginning with # are skipped, and a prompt may end with OPTIONS.
    """
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        try:
            return list(build(PromptFile, read_yaml(path)).prompts)
        except CascadeError as error:
            raise CascadeError(f"output.prompts_file {printable(str(path))}: {error}") from None
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [_of_line(line, path) for line in lines if line and not line.startswith("#")]


def _of_line(line: str, path: Path) -> SamplePrompt:
    text, *options = _OPTION.split(line)
    given: dict[str, str] = {}
    for letter, value in zip(options[::2], options[1::2], strict=True):
        if letter not in OPTIONS:
            known = ", ".join(f"--{letter}" for letter in OPTIONS)
            raise CascadeError(f"{printable(str(path))}: --{letter} of {quoted(line)} is not one of {known}.")
        given[OPTIONS[letter]] = value.strip()
    try:
        whole = {name: int(given.pop(name)) for name in ("width", "height", "seed", "steps") if name in given}
        cfg = float(given["cfg"]) if "cfg" in given else None
    except ValueError:
        raise CascadeError(f"{printable(str(path))}: numbers are expected in {quoted(line)}.") from None
    width, height = (whole.pop(name, None) for name in ("width", "height"))
    sides = [side for side in (width, height) if side is not None]
    size = (width or sides[0], height or sides[0]) if sides else None
    return SamplePrompt(text, given.get("negative", ""), size=size, cfg=cfg, **whole)


def sample_prompts(settings: Settings) -> list[SamplePrompt]:
    """All prompts, with values that they leave open filled in from the settings."""
    output, complete = settings.output, []
    for number, given in enumerate(output.prompts):
        prompt = SamplePrompt(given) if isinstance(given, str) else given
        size = prompt.size or (settings.data.size // 8 * 8,)
        complete.append(
            replace(
                prompt,
                seed=(settings.train.seed + number) % 2**63 if prompt.seed is None else prompt.seed,
                size=(size[0], size[-1]),
                steps=prompt.steps or output.sample_steps,
                cfg=output.sample_cfg if prompt.cfg is None else prompt.cfg,
            )
        )
    return complete


def texts_of(prompts: Sequence[str | SamplePrompt]) -> list[str]:
    """Every text to encode for these prompts."""
    pairs = ((each, "") if isinstance(each, str) else (each.prompt, each.negative) for each in prompts)
    return [text for pair in pairs for text in pair]
