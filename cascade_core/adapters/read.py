"""LoRA files of every dialect, read into one form.

Whatever the spelling, a key consists of a layer's name and an ending for one of its tensors. So one table of names
and one of endings serve all programs, mixtures included; the file's dialect is determined only afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..checkpoints.files import FLOATING, read_safetensors
from ..checkpoints.foreign import EMBEDDING, foreign_name
from ..checkpoints.layouts import WRAPPERS, parts_in, without_wrapped_modules
from ..checkpoints.load import PART_NAMES
from ..checkpoints.quantised import FP8, unscaled
from ..checkpoints.source import is_counter
from ..errors import CascadeError, printable
from ..networks.config import StageCConfig
from ..networks.stage_c import StageC
from ..text.learned_tokens import LearnedToken
from .adapter import Adapter
from .algorithms import ENDINGS, NOT_FLOATING, READ, WHOLE, Layer, changes_of
from .changes import Change, Hadamard, Kronecker, LowRank
from .compatibility import listed
from .dialects import DIALECTS, STAGE_C_PREFIXES, TEXT_PREFIXES, Dialect
from .foreign import foreign_model, other_algorithms
from .fused import split
from .names import FUSED, is_stage_b, layer_of, stage_c_layer, text_layer
from .official import is_official, read_official
from .order import Filters, parse_filters
from .peft import StatedAlpha, adapter_file, assumed_alpha, stated_alpha

_LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)
_BUNDLED, _BUNDLED_ENDINGS = "bundle_emb.", (".clip_g", ".clip_g_out", ".string_to_param.*")
_PEFT = "base_model.model."
# PEFT's name for an adapter in memory, by default `default`; files saved by PEFT itself leave it out.
_ADAPTER_NAME = re.compile(
    r"(?:(\.lora_[AB]|\.lora_magnitude_vector)|\.modules_to_save)\.[^.]+(?=\.(?:weight|bias)$)"
)
_LORA_WRAPPERS = {*WRAPPERS} - {"decoder"}  # "decoder" means Stage B, whose layers have the same names
ARCHITECTURE_KEY, STAGE_B = "modelspec.architecture", "stable-cascade-v1-stage-b"
_EMBEDDING = ("clip_g", "clip_g_out", "emb_params", "string_to_param.*")


def read_adapter(
    path: str | Path,
    stage_c: StageC | StageCConfig | None = None,
    alpha: float = 0.0,
    filters: str = "",
) -> Adapter:
    """Reads a LoRA or embedding file, or PEFT's folder; the tensors are views of the mapped file.

    stage_c: the network that it is for; needed only for the official dialect, which numbers its layers, and there
    only for sizes that were not published. alpha: of layers for which the file states none (0: as stated beside the
    file, else their rank). filters: the `module_filters` that an official file was trained with ("": inferred from
    the shapes). Raises CascadeError for a file that cannot be read or is not an adapter of Stable Cascade.
    """
    path = adapter_file(Path(path))
    tensors, metadata = read_safetensors(path)
    stated = stated_alpha(path, metadata, alpha)
    return parse_adapter(tensors, metadata, path.name, stage_c, stated, parse_filters(filters))


def parse_adapter(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str,
    stage_c: StageC | StageCConfig | None = None,
    alpha: StatedAlpha | None = None,
    filters: Filters | None = None,
) -> Adapter:
    """Parses a file's tensors into an adapter; name: of the file.

    stage_c, filters: as in `read_adapter`; alpha: gives the alpha of layers without one of their own (None: the
    rank). Raises CascadeError for tensors of another model or of an unsupported algorithm, and for incomplete ones.
    """
    tensors = _unwrapped(tensors, name)
    _check_types(tensors, name)
    if is_official(tensors):
        config = stage_c.config if isinstance(stage_c, StageC) else stage_c
        adapter = read_official(tensors, metadata, name, config, filters)
    elif any(key in tensors for key in _EMBEDDING):
        adapter = _embedding(tensors, name)
    else:
        adapter = _of_stage_b(_named(tensors, name, alpha), metadata)
    notes = list(adapter.notes)
    if filters is not None and not any(is_official([key]) and "lora_" in key for key in tensors):
        notes.append(
            f"module_filters are of official LoRAs with numbered layers, and have no effect on {name}."
        )
    if alpha is not None and alpha.given and adapter.dialect in ("official", "embedding"):
        notes.append(_without_effect(name))
    return replace(adapter, notes=tuple(notes), metadata=metadata)


def _of_stage_b(adapter: Adapter, metadata: Mapping[str, str]) -> Adapter:
    """The adapter with its changes assigned to their stage: most names occur in both, some in Stage B alone."""
    stated = STAGE_B in metadata.get(ARCHITECTURE_KEY, "")
    if not (stated or any(map(is_stage_b, map(layer_of, adapter.stage_c)))):
        return adapter
    return replace(adapter, stage_c={}, stage_b=adapter.stage_c)


def _without_effect(name: str) -> str:
    return f"The given alpha has no effect: nothing in {name} is scaled by one that it does not state itself."


def _unwrapped(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors without additions of torch and trainers: wrappers and PEFT's adapter name in names, fp8 scales, and
    single numbers such as `step`.

    fp8 tensors become fp16, which holds every value of both fp8 formats, and which torch can compute with.
    """
    unwrapped: dict[str, Tensor] = {}
    for key, tensor in unscaled(name, tensors).items():
        plain = _ADAPTER_NAME.sub(lambda found: found[1] or "", without_wrapped_modules(key))
        while plain.startswith("module."):
            plain = plain.removeprefix("module.")
        if plain in unwrapped:
            raise CascadeError(
                f"{name}: {printable(plain)} stands twice, once as {printable(key)}; choose a file that holds it once."
            )
        if _parted(plain, _LONGEST_FIRST) or not is_counter(plain, tensor):
            unwrapped[plain] = tensor.half() if tensor.dtype in FP8.values() else tensor
    return unwrapped


def _check_types(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in tensors.items():
        parted = _parted(key, _LONGEST_FIRST)
        if parted and tensor.dtype not in FLOATING and ENDINGS[parted[1]] not in NOT_FLOATING:
            raise CascadeError(
                f"{name}: {printable(key)} holds {tensor.dtype}, but floating point is expected; choose a LoRA "
                "that is not quantised."
            )


def _embedding(tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """An embedding file: a new token with the file's name, for the encoder's input, its output, or both."""
    stem = name.rpartition(".")[0] or name
    tokens = [_token(stem, tensors[key], key, name) for key in _EMBEDDING if key in tensors]
    unknown = tuple(key for key in tensors if key not in _EMBEDDING)
    return Adapter(name, "embedding", tokens=tuple(tokens), unknown=unknown)


def _token(token: str, vectors: Tensor, key: str, name: str) -> LearnedToken:
    rows = vectors[None] if vectors.ndim == 1 else vectors
    if rows.ndim != 2 or rows.numel() == 0 or rows.dtype not in FLOATING:
        raise CascadeError(
            f"{name}: {printable(key)} has the shape {tuple(vectors.shape)}, but a learned token has rows (V, C); "
            "choose another embedding."
        )
    return LearnedToken(token, rows.float(), output=key.endswith("_out"))


def _named(tensors: Mapping[str, Tensor], name: str, alpha: StatedAlpha | None) -> Adapter:
    if alpha is not None and alpha.unread_type is not None:
        stated = {printable(alpha.unread_type): ["by its configuration"]}
        _refuse(other_algorithms(tensors) or stated, name)
    layers: dict[str, dict[str, Tensor]] = {}  # by the layers' names in the file
    keys: dict[str, list[str]] = {}
    tokens, unknown = [], []
    for key, tensor in tensors.items():
        bundled = key.startswith(_BUNDLED) and _parted(key.removeprefix(_BUNDLED), _BUNDLED_ENDINGS)
        if bundled:
            tokens.append(_token(bundled[0], tensor, key, name))
        elif parted := _parted(key, _LONGEST_FIRST):
            layer, ending = parted
            layers.setdefault(layer, {})[ENDINGS[ending]] = tensor
            keys.setdefault(layer, []).append(key)
        elif parted := _whole(key, tensors):
            layer, part = parted
            layers.setdefault(layer, {})[part] = tensor
            keys.setdefault(layer, []).append(key)
        else:
            unknown.append(key)
    changes: dict[str, dict[str, Change]] = {"stage_c": {}, "text": {}}
    spelled: list[tuple[str, str, str]] = []  # network, our name, theirs
    asked: set[str] = set()  # layers without an alpha of their own
    for theirs, parts in layers.items():
        located = _locate(theirs)
        network, layer = located or ("", "")
        targets = changes_of(_layer(layer, theirs, alpha, name, asked), parts) if layer else {}
        if not targets:
            unknown += keys[theirs]
            continue
        _put(changes[network], targets, name)
        spelled.append((network, layer, theirs))
    unread = {key: tensors[key] for key in unknown}
    _check_known(tensors, unread, bool(changes["stage_c"] or tokens), bool(spelled or tokens), name)
    dialect = _dialect(spelled, tensors) if spelled else "onetrainer"
    changed = [*changes["stage_c"].values(), *changes["text"].values()]
    notes = [alpha.note] if alpha is not None and alpha.note else []
    if _assumes_alpha(changed, dialect, tensors, alpha):
        notes.append(assumed_alpha(name))
    if alpha is not None and alpha.given and not asked:
        notes.append(_without_effect(name))
    return Adapter(
        name, dialect, changes["stage_c"], changes["text"], tuple(tokens), tuple(unknown), tuple(notes)
    )


def _assumes_alpha(
    changes: Iterable[Change], dialect: str, tensors: Iterable[str], stated: StatedAlpha | None
) -> bool:
    """Whether layers without an alpha are read as if it were their rank. ComfyUI's LoraSave multiplies it in."""
    if dialect == "comfyui" and not any(".lora_A." in key for key in tensors):
        return False
    return any(
        isinstance(change, LowRank | Hadamard | Kronecker)
        and change.alpha is None
        # A LoKr of whole matrices is scaled only in PEFT.
        and (change.rank or (dialect == "peft" and stated is None))
        for change in changes
    )


def _parted(key: str, endings: Iterable[str]) -> tuple[str, str] | None:
    """(the part before the ending, the ending) of a key, for the first of these endings that it has."""
    ending = next((ending for ending in endings if key.endswith(ending) and len(key) > len(ending)), None)
    return None if ending is None else (key.removesuffix(ending), ending)


def _locate(theirs: str) -> tuple[str, str] | None:
    """(network, our name) of a layer by its name in the file."""
    theirs = theirs.removeprefix(_PEFT)
    first, _, rest = theirs.partition(".")
    if first in _LORA_WRAPPERS and rest and (located := _locate(rest)):
        return located
    for network, prefixes, parse in (
        ("text", TEXT_PREFIXES, text_layer),
        ("stage_c", STAGE_C_PREFIXES, stage_c_layer),
    ):
        for prefix in prefixes:
            if theirs.startswith(prefix) and (layer := parse(theirs.removeprefix(prefix))):
                return network, layer
    return None


def _whole(key: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(layer, part) of PEFT's whole parameters, and of (IA)³ of LyCORIS, which says so in another tensor."""
    parted = _parted(key, WHOLE)
    if parted is None or not (key.startswith(_PEFT) or f"{parted[0]}.on_input" in tensors):
        return None
    return parted[0].removesuffix(".base_layer"), WHOLE[parted[1]]


def _layer(layer: str, theirs: str, stated: StatedAlpha | None, name: str, asked: set[str]) -> Layer:
    def alpha_of(rank: int) -> float | None:
        asked.add(theirs)
        return stated.of(theirs, rank) if stated else None

    return Layer(layer, theirs, f"{name}: {printable(theirs)}", stated.config if stated else {}, alpha_of)


def _put(changes: dict[str, Change], targets: Mapping[str, Change], name: str) -> None:
    """Adds changes; those of the fused attention input are split into three."""
    for target, change in targets.items():
        parts = split(change, target) if FUSED in target else {target: change}
        twice = changes.keys() & parts.keys()
        if twice:
            raise CascadeError(
                f"{name} changes {min(twice)} twice, under two names; choose a LoRA of one program."
            )
        changes.update(parts)


def _check_known(
    tensors: Mapping[str, Tensor], unread: Mapping[str, Tensor], for_stage_c: bool, matched: bool, name: str
) -> None:
    """Raises CascadeError where the unread tensors show a file of another model or of an unsupported algorithm."""
    _refuse(other_algorithms(unread), name)
    weights = None if matched else _whole_weights(tensors)
    if weights == f"a {EMBEDDING}":
        stem = printable(name.rpartition(".")[0] or name)
        raise CascadeError(
            f"{name} is a {EMBEDDING}, but a LoRA is expected here; put it into models/embeddings and write "
            f"embedding:{stem} into the prompt, if it was trained for CLIP ViT-bigG."
        )
    if weights is not None:
        raise CascadeError(f"{name} holds the weights of {weights}, but a LoRA is expected here; choose one.")
    model = foreign_model(unread)
    counts = f"{len(tensors) - len(unread)} of its {len(tensors)} tensors match"
    if model is not None:
        raise CascadeError(
            f"{name} is a LoRA for {model}, not for Stable Cascade's Stage C: {counts}; choose a Stable Cascade LoRA."
        )
    if not (matched and (for_stage_c or not unread)):
        unknown = f" (unknown: {listed(unread)})" if unread else ""
        raise CascadeError(
            f"{name} is not a LoRA for Stable Cascade: {counts}{unknown}; choose a Stable Cascade LoRA."
        )


def _refuse(algorithms: Mapping[str, list[str]], name: str) -> None:
    """Raises CascadeError, naming the algorithms, if there are any."""
    if algorithms:
        contents = ", ".join(f"{algorithm} ({listed(names, 1)})" for algorithm, names in algorithms.items())
        raise CascadeError(
            f"{name} is an adapter of another kind, {contents}, which is not read: {READ} are; merge it into its model "
            "with the program that made it, or train it as a LoRA."
        )


def _whole_weights(tensors: Mapping[str, Tensor]) -> str | None:
    """Names the networks whose whole weights a file holds, or None."""
    inside = [PART_NAMES[part] for part in parts_in(tensors)]
    model = foreign_name(tensors)
    return ", ".join(inside) or (f"a {model}" if model not in (None, "LoRA") else None)


def _dialect(spelled: list[tuple[str, str, str]], tensors: Mapping[str, Tensor]) -> str:
    """The dialect that would have written most of the file's keys; of several, the first in the table."""

    def written(dialect: Dialect) -> int:
        score = 0
        for network, layer, theirs in spelled:
            names = {"stage_c": dialect.stage_c, "text": dialect.text}
            if names[network] is None:
                continue
            name = dialect.stage_c_name(layer) if network == "stage_c" else dialect.text_name(layer)
            score += (name == theirs) * (2 + (theirs + dialect.down in tensors))
        return score

    named = {key: dialect for key, dialect in DIALECTS.items() if dialect.kind == "named"}
    return max(named, key=lambda key: written(named[key]))
