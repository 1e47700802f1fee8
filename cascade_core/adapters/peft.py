"""The scale of a PEFT LoRA, which is stated in a file beside its tensors, in their header, or nowhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from ..checkpoints import read_json
from ..checkpoints.files import FLOATING
from ..errors import CascadeError, quoted
from .patterns import texts

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
HEADER_ENTRY = "lora_adapter_metadata"  # of the tensors' file, where diffusers writes the same configuration
LARGEST_ALPHA = 1e6
_TEXT = "text_"  # in every name of the text encoder and of its layers, and in none of Stage C's
# Values of `init_lora_weights` that leave the network's weights alone; others move a part of them into the LoRA.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_OTHER_KINDS = {"kasa_config": "KaSA", "monteclora_config": "MonteCLoRA", "use_qalora": "QALoRA"}

# The supported types, and the configuration entry that scales each.
_ALPHA_ENTRIES = {
    None: "lora_alpha", "LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha",
    "OFT": None, "BOFT": None, "IA3": None,
}  # fmt: skip

AlphaOf = Callable[[str, int], float | None]  # a layer's name in the file, its rank -> alpha


@dataclass(frozen=True)
class StatedAlpha:
    """Alphas of the layers that have none of their own.

    of       gives a layer's alpha, or None where nothing states it
    note     what was assumed, in a sentence, or ""
    config   the whole of PEFT's configuration of a file of one network, as it is written
    given    whether the user gave one alpha for all
    """

    of: AlphaOf
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False

    @property
    def unread_type(self) -> str | None:
        """PEFT's name of the adapter's type if it is unsupported, else None."""
        peft_type = self.config.get("peft_type")
        return None if peft_type in _ALPHA_ENTRIES else peft_type


def stated_alpha(path: Path, metadata: Mapping[str, str], alpha: float = 0.0) -> StatedAlpha | None:
    """The alphas of the LoRA at `path`: the given alpha (0: none given), else those of PEFT's configuration; None
    without one.

    The configuration is in the file's own metadata, as diffusers writes it, or in adapter_config.json beside it,
    which is used for a file of any name if that is the only safetensors file in the folder. Raises CascadeError where
    it is damaged, or states a LoRA whose training changed the network's own weights as well.
    """
    networks, where, notes = _in_header(metadata), f"{path} ({HEADER_ENTRY})", []
    beside = path.with_name(CONFIG_FILE)
    if not networks and beside.exists() and (path.name == WEIGHTS_FILE or _is_alone(path)):
        networks, where = {"": read_json(beside)}, str(beside)
        if path.name != WEIGHTS_FILE and not alpha:
            notes.append(f"{path.name} takes its alpha from {CONFIG_FILE} beside it.")
    for config in networks.values():
        _check_plain(config, where)
    if any(config.get("fan_in_fan_out") for config in networks.values()):
        notes.append(
            f"{path.name} states fan_in_fan_out, which PEFT itself leaves out for layers such as these."
        )
    if not networks:
        return StatedAlpha(lambda layer, rank: alpha, given=True) if alpha else None
    alphas = {network: _alpha_of(config, where, alpha) for network, config in networks.items()}
    only = next(iter(alphas)) if len(alphas) == 1 else None

    def of(layer: str, rank: int) -> float | None:
        name = layer.removeprefix("base_model.model.")
        network, _, inside = name.partition(".")
        if network in alphas:  # diffusers keeps several networks in one file
            return alphas[network](inside, rank)
        # The only network in the configuration may have another name in its layers' names, or none.
        if only is not None and (only == "" or (_TEXT in only) == (_TEXT in name)):
            return alphas[only](name, rank)
        return alpha or None

    config = next(iter(networks.values())) if len(networks) == 1 else {}
    return StatedAlpha(of, " ".join(notes), config, bool(alpha))


def adapter_file(path: Path) -> Path:
    """The file of an adapter's tensors at `path`, which may be PEFT's folder of it."""
    inside = path / WEIGHTS_FILE
    return inside if os.path.isfile(inside) else path


def assumed_alpha(name: str) -> str:
    """A sentence about the alphas assumed for a file that states none."""
    return (
        f"{name} states no alpha, and each layer's rank is taken for it; if its training had another (lora_alpha in "
        f"PEFT's {CONFIG_FILE}), give that as alpha."
    )


def with_singular_values(down: Tensor, singular: Tensor | None, where: str) -> Tensor:
    """E · down of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ΔW = scale · up @ (E · down), E (rank, 1)."""
    rank = len(down)
    if singular is None or singular.numel() != rank or singular.dtype not in FLOATING:
        raise CascadeError(
            f"{where} is of an AdaLoRA adapter, but its lora_E ({rank}, 1) is not there; download it again."
        )
    return down.float() * singular.float().reshape(rank, *[1] * (down.ndim - 1))


def _is_alone(path: Path) -> bool:
    return list(path.parent.glob("*.safetensors")) == [path]


def _in_header(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{network: its configuration} in a file's metadata. diffusers prefixes every entry with the network
    (`prior.lora_alpha`), as it does layers' names. In a file of one network the prefix may be missing; that network
    is "" here.
    """
    try:
        entries = json.loads(metadata.get(HEADER_ENTRY, "{}"))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        return {}
    if entries.keys() & {"lora_alpha", "peft_type"}:
        return {"": entries}
    networks: dict[str, dict[str, Any]] = {}
    for entry, value in entries.items():
        network, _, name = entry.rpartition(".")
        networks.setdefault(network, {})[name] = value
    return {network: config for network, config in networks.items() if "lora_alpha" in config}


def _check_plain(config: Mapping[str, Any], where: str) -> None:
    peft_type, init = config.get("peft_type"), config.get("init_lora_weights")
    if not isinstance(peft_type, str | None):
        raise CascadeError(
            f"{where} states the peft_type {quoted(peft_type)}, but one word such as LORA is expected; download it "
            "again."
        )
    if peft_type not in _ALPHA_ENTRIES:
        return
    other = next((kind for entry, kind in _OTHER_KINDS.items() if config.get(entry)), None)
    if init in _PLAIN_INITS and other is None:
        return
    what = f"a LoRA with init_lora_weights {quoted(init)}" if other is None else f"a {other} adapter"
    raise CascadeError(
        f"{where} states {what}, for which PEFT changes the network's own weights as well, so that the tensors alone "
        "do not hold the change; save it from PEFT with path_initial_model_for_weight_conversion, as a plain LoRA."
    )


def _alpha_of(config: Mapping[str, Any], where: str, given: float) -> AlphaOf:
    """Alphas by PEFT's configuration, or given ones. rsLoRA (arXiv 2312.03732) divides alpha by the root of the rank;
    AdaLoRA scales by the rank that it began with, not by the one that was left.
    """
    peft_type = config.get("peft_type")
    entry = _ALPHA_ENTRIES.get(peft_type)
    if entry is None:
        return lambda layer, rank: None
    alpha, patterns = config.get(entry), config.get("alpha_pattern") or {}
    root, first = config.get("use_rslora") or False, config.get("init_r")
    if given:
        alpha, patterns, root = given, {}, False
    if not (_is_alpha(alpha) and isinstance(patterns, dict) and isinstance(root, bool)):
        raise CascadeError(
            f"{where} is not a PEFT configuration with a {entry} above 0, by which the LoRA beside it is scaled "
            f"({entry} {quoted(alpha)}, use_rslora {quoted(root)}); download it again."
        )
    everywhere = float(alpha)
    if peft_type == "ADALORA":
        first = first if type(first) is int and first > 0 else None
        return lambda layer, rank: everywhere * rank / ((first or rank) + 1e-5)
    named = _by_name(patterns, where)

    def alpha_of(layer: str, rank: int) -> float | None:
        parts = layer.split(".")
        endings = [f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))]
        _, alpha_here = min((named[ending] for ending in endings if ending in named), default=(0, everywhere))
        return alpha_here * math.sqrt(rank) if root else alpha_here

    return alpha_of


def _by_name(patterns: dict[str, Any], where: str) -> dict[str, tuple[int, float]]:
    """{the end of a name, or ^ and the whole name: (number of the pattern, its alpha)}; the first pattern counts.

    PEFT runs them as regular expressions, `(.*\\.)?(pattern)$`; here they are names.
    """
    named: dict[str, tuple[int, float]] = {}
    for number, (pattern, alpha) in enumerate(patterns.items()):
        names = texts(pattern, plain=".")
        if names is None or not _is_alpha(alpha):
            raise CascadeError(
                f"{where} states the alpha {quoted(alpha)} for {quoted(pattern)} in alpha_pattern, but numbers above 0 "
                "for layers' names are expected, with | between several; write the names in place of a regular "
                "expression, which is not run."
            )
        for name in names:
            named.setdefault(f"{'^' * name.at_start}{name.text}", (number, alpha))
    return named


def _is_alpha(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 < value <= LARGEST_ALPHA  # False for NaN
