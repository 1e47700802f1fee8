"""Compatibility of an adapter with a network, and the contents of its file in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CascadeError, printable
from ..networks.config import StageBConfig, StageCConfig
from ..text.learned_tokens import LearnedToken
from .adapter import Adapter
from .changes import AddedChange, Change, LowRank
from .names import layer_of, parameter_shapes, stage_parameters

_NETWORKS = {"stage_c": "Stage C", "stage_b": "Stage B", "text": "text encoder"}


def check_kind(adapter: Adapter, kind: str) -> None:
    """Raises CascadeError for an adapter that was trained for the other stage than this network."""
    other = {"stage_c": "stage_b", "stage_b": "stage_c"}[kind]
    if getattr(adapter, other) and not getattr(adapter, kind):
        raise CascadeError(
            f"{adapter.name} is a LoRA of {_NETWORKS[other]}, but the network here is {_NETWORKS[kind]}; apply it to "
            f"{_NETWORKS[other]}, or choose another LoRA."
        )


def check_fits(
    adapter: Adapter, network: nn.Module | StageCConfig | StageBConfig, part: str = "stage_c"
) -> None:
    """Raises CascadeError, with counts and sizes, unless the network has every layer that the adapter changes.

    part: "stage_c", "stage_b" or "text": the adapter's changes to check.
    """
    if part != "text":
        check_kind(adapter, part)
    if isinstance(network, StageCConfig | StageBConfig):
        shapes = stage_parameters(network)
    else:
        shapes = parameter_shapes(network)
    changes: Mapping[str, Change] = getattr(adapter, part)
    missing = [layer for layer in changes if layer not in shapes]
    misshapen = [
        layer for layer, change in changes.items() if layer in shapes and not change.fits(shapes[layer])
    ]
    if not missing and not misshapen:
        return
    network_name = _NETWORKS[part]
    problems = []
    if missing:
        problems.append(f"{len(missing)} do not exist in it ({listed(missing)})")
    if misshapen:
        first, change = misshapen[0], changes[misshapen[0]]
        sizes = f"{_product(change.shape)} instead of {_product(shapes[first])}"
        problems.append(f"{len(misshapen)} have another size ({first}: {sizes})")
    raise CascadeError(
        f"{adapter.name} is a LoRA for another {network_name}: of the {len(changes)} layers that it changes "
        f"{' and '.join(problems)}; use it with the {network_name} that it was made for, or choose another LoRA."
    )


def check_finite_adapter(adapter: Adapter) -> None:
    """Raises CascadeError where an adapter holds NaN or infinity. Reads every tensor."""
    for changes in (adapter.stage_c, adapter.stage_b, adapter.text):
        check_finite_changes(changes, adapter.name)
    for token in adapter.tokens:
        check_finite_token(token, adapter.name)


def check_finite_token(token: LearnedToken, name: str) -> None:
    if not torch.isfinite(token.vectors).all():
        raise CascadeError(f"{name} holds NaN or infinity in a learned token; download it again.")


def check_finite_changes(changes: Mapping[str, Change], name: str) -> None:
    """Raises CascadeError, naming the adapter, where a change holds NaN or infinity. Reads every tensor."""
    for layer, change in changes.items():
        for part, tensor in change.tensors().items():
            if not torch.isfinite(tensor).all():
                raise CascadeError(
                    f"{name} holds NaN or infinity in {part} of {printable(layer)}; download it again."
                )


def _product(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def listed(names: Iterable[str], most: int = 3) -> str:
    """Joins the first few names, in printable form, with an ellipsis if there are more."""
    names = list(names)
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter's contents for programs: dialect, kinds, layers, ranks, alphas and learned tokens."""
    changes = [*adapter.stage_c.values(), *adapter.stage_b.values(), *adapter.text.values()]
    decomposed = sum(isinstance(change, AddedChange) and change.magnitude is not None for change in changes)
    return {
        "dialect": adapter.dialect,
        "kinds": list(dict.fromkeys(change.algorithm for change in changes)),
        "stage_c_layers": len({layer_of(target) for target in adapter.stage_c}),
        "stage_b_layers": len({layer_of(target) for target in adapter.stage_b}),
        "text_layers": len({layer_of(target) for target in adapter.text}),
        "ranks": sorted({change.rank for change in changes if change.rank is not None}),
        "alphas": sorted(
            {alpha for change in changes if (alpha := getattr(change, "alpha", None)) is not None}
        ),
        "dora_layers": decomposed,
        "tokens": list(
            dict.fromkeys(token.name or f"vocabulary's {token.index}" for token in adapter.tokens)
        ),
    }


def describe_adapter(adapter: Adapter) -> str:
    """Describes an adapter: "x.safetensors (kohya): 128 layers of Stage C, rank 4, 1 learned token ([star])"."""
    facts = adapter_facts(adapter)
    others = [kind for kind in facts["kinds"] if kind != LowRank.algorithm]
    ranks, tokens = facts["ranks"], facts["tokens"]
    contents = [
        (facts["stage_c_layers"], f"{facts['stage_c_layers']} layers of Stage C"),
        (facts["stage_b_layers"], f"{facts['stage_b_layers']} layers of Stage B"),
        (facts["text_layers"], f"{facts['text_layers']} layers of the text encoder"),
        (len(others), ", ".join(others)),
        (
            len(ranks),
            "rank " + (str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else ""),
        ),
        (facts["dora_layers"], f"DoRA magnitudes of {facts['dora_layers']}"),
        (len(tokens), f"{len(tokens)} learned token{'s' * (len(tokens) > 1)} ({listed(tokens)})"),
    ]
    return f"{adapter.name} ({adapter.dialect}): {', '.join(text for count, text in contents if count)}"


def describe_unknown(adapter: Adapter) -> str | None:
    """Names the tensors of the file that are left out, in a sentence; None if there are none."""
    if not adapter.unknown:
        return None
    count = len(adapter.unknown)
    return (
        f"{adapter.name} holds {count} tensor{'s' * (count > 1)} of no known layer or token of Stable Cascade, "
        f"and {'they are' if count > 1 else 'it is'} left out: {listed(adapter.unknown)}."
    )
