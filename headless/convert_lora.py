"""`cascade convert-lora IN OUT --to DIALECT`: a LoRA file in another program's keys.

Nothing heavy is imported before the command runs, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cascade_core.errors import CascadeError

if TYPE_CHECKING:
    from ..cascade_core.adapters import Adapter
    from ..cascade_core.networks.config import StageCConfig

PARTS = ("stage_c", "text", "tokens")  # the parts that can be left out


class _Help(argparse.Action):
    """Help action that lists the dialects, which needs torch."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show this help message and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = "dialects:\n" + list_dialects()
        parser.print_help()
        parser.exit()


def add_convert_command(commands: Any) -> None:
    convert = commands.add_parser(
        "convert-lora",
        add_help=False,
        help="write a LoRA in another program's keys",
        description="Reads a LoRA of any dialect and writes it in another, exactly, whole or not at all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("-h", "--help", action=_Help)
    convert.add_argument(
        "source", type=Path, metavar="IN", help="a LoRA in a safetensors file, or PEFT's folder"
    )
    convert.add_argument(
        "target", type=Path, metavar="OUT", help="the file to write; with --to peft also a folder"
    )
    convert.add_argument("--to", required=True, metavar="DIALECT", help="one of those that --help lists")
    model = (
        "the Stage C it is for, whose layers the official dialect numbers; not needed for the published sizes"
    )
    convert.add_argument("--model", type=Path, metavar="FILE", help=model)
    alpha = "the alpha it was trained with, where neither the file nor an adapter_config.json says it"
    convert.add_argument("--alpha", type=float, default=0.0, metavar="NUMBER", help=alpha)
    filters = (
        "the module_filters an official LoRA was trained with, where the shapes fit several: .attn,kv_mapper"
    )
    convert.add_argument("--filters", default="", metavar="LIST", help=filters)
    without = f"leave out {', '.join(PARTS)}, where the dialect has no keys for it; may be repeated"
    convert.add_argument(
        "--without", action="append", default=[], choices=PARTS, metavar="PART", help=without
    )
    convert.add_argument("--partial", action="store_true", help="leave out tensors that are not known")
    convert.add_argument("--force", action="store_true", help="overwrite OUT")
    convert.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)
    convert.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> int:
    for line in convert_lora(
        options.source,
        options.target,
        options.to,
        options.model,
        tuple(options.without),
        options.partial,
        options.force,
        options.alpha,
        options.filters,
    ):
        print(line)
    return 0


def list_dialects() -> str:
    """Lists the dialects, one a line."""
    from ..cascade_core.adapters import DIALECTS

    width = max(map(len, DIALECTS))
    return "\n".join(f"  {name:{width}}  {dialect.about}" for name, dialect in DIALECTS.items())


def convert_lora(
    source: Path,
    target: Path,
    dialect: str,
    model: Path | None = None,
    without: tuple[str, ...] = (),
    partial: bool = False,
    force: bool = False,
    alpha: float = 0.0,
    filters: str = "",
) -> list[str]:
    """Writes `target` and returns the lines of its report. alpha, filters: as in `read_adapter`.

    Raises CascadeError, and writes nothing, on failure.
    """
    from ..cascade_core import limits
    from ..cascade_core.adapters import check_finite_adapter, describe_file, read_adapter, write_adapter
    from ..cascade_core.adapters.write import PARTS as NOTHING
    from ..cascade_core.adapters.write import cautions

    _check_dialect(dialect)
    target, beside = _outputs(target, dialect)
    check_target(target, force)
    if beside is not None:
        _check_configuration(beside, target, force)
    config = None if model is None else stage_c_config(model)
    adapter = read_adapter(source, config, limits.real_number("alpha", alpha, limits.ALPHA), filters)
    _check_whole(adapter, config, partial)
    check_finite_adapter(adapter)
    lines = describe_file(adapter)
    if without:
        lines.append(f"Left out: {', '.join(without)}")
    converted = replace(adapter, **{part: NOTHING[part] for part in without})
    if not (converted.stage_c or converted.stage_b or converted.text or converted.tokens):
        raise CascadeError(f"Nothing of {source.name} is left to write; leave out less (--without).")
    write_adapter(
        target, converted, dialect, config, metadata=adapter.metadata, overwrite=force, configuration=beside
    )
    lines += [*cautions(converted, dialect, beside is not None), f"Written: {target} ({dialect})"]
    return lines if beside is None else [*lines, f"Written: {beside}"]


def _outputs(target: Path, dialect: str) -> tuple[Path, Path | None]:
    """(path of the tensors, path of PEFT's configuration or None). For PEFT, OUT is its folder, or the tensors' usual
    file in one; a file with any other name holds its configuration itself, and nothing is written beside it.
    """
    from ..cascade_core.adapters.peft import CONFIG_FILE, WEIGHTS_FILE

    if dialect == "peft" and target.suffix != ".safetensors":
        target = target / WEIGHTS_FILE
    is_pefts = dialect == "peft" and target.name == WEIGHTS_FILE
    return target, target.with_name(CONFIG_FILE) if is_pefts else None


def _check_configuration(beside: Path, target: Path, force: bool) -> None:
    """Raises CascadeError where another configuration exists; --force replaces it only together with its tensors."""
    if os.path.lexists(beside) and not os.path.lexists(target):
        raise CascadeError(
            f"{beside} is there already, of another adapter than {target.name}; choose another folder."
        )
    check_place(beside, force)


def _check_dialect(dialect: str) -> None:
    from ..cascade_core.adapters import DIALECTS

    if dialect not in DIALECTS:
        close = get_close_matches(dialect, DIALECTS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(DIALECTS)}."
        raise CascadeError(f"There is no LoRA dialect {dialect!r}; {hint}")


def check_target(target: Path, force: bool) -> None:
    if target.suffix != ".safetensors":
        raise CascadeError(f"{target} is to be a safetensors file; give it a name that ends in .safetensors.")
    check_place(target, force)


def check_place(target: Path, force: bool) -> None:
    """Raises CascadeError for an existing file that must not be overwritten, and where no file can be written."""
    from ..cascade_core.checkpoints import check_writable

    if os.path.lexists(target) and not force:
        raise CascadeError(f"{target} is there already; choose another name, or overwrite it with --force.")
    check_writable(target)


def _check_whole(adapter: Adapter, config: StageCConfig | None, partial: bool) -> None:
    """Raises CascadeError for layers that the model lacks, and for unknown tensors unless they are left out."""
    from ..cascade_core.adapters import check_fits, describe_unknown

    if config is not None:
        check_fits(adapter, config)
    unknown = describe_unknown(adapter)
    if unknown is not None and not partial:
        raise CascadeError(f"{unknown} Nothing was written; --partial converts the rest.")


def stage_c_config(model: Path) -> StageCConfig:
    """Reads Stage C's configuration from the file's names and shapes alone."""
    from ..cascade_core.checkpoints import identify, read_weights
    from ..cascade_core.networks.config import StageCConfig

    _, config = identify(model, *read_weights(model, "stage_c"), expect="stage_c")
    return StageCConfig.from_dict(config)
