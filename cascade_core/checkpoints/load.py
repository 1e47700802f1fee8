"""Loads a module with its weights from a file or a state dict."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CascadeError, printable
from ..networks.compressor import SemanticCompressor
from ..networks.controlnet import ControlNet
from ..networks.inference import infer_config, stated_config
from ..networks.precision import cast_on_the_way
from ..networks.previewer import Previewer
from ..networks.quantisation import QuantisedWeight, quantisable, quantise_network, quantised_layers
from ..networks.stage_a import StageA
from ..networks.stage_b import StageB
from ..networks.stage_c import StageC
from .attention import split_attention
from .files import FLOATING, read_safetensors
from .foreign import foreign_name, is_ultrapixel
from .layouts import parts_in
from .pages import forget_pages, mapped_files
from .quantised import as_float
from .source import read_quantised, read_weights

NETWORKS: dict[str, Any] = {
    "stage_a": StageA,
    "stage_b": StageB,
    "stage_c": StageC,
    "compressor": SemanticCompressor,
    "previewer": Previewer,
    "controlnet": ControlNet,
}

KIND_NAMES = {
    "stage_a": "Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "compressor": "semantic compressor",
    "previewer": "previewer",
    "controlnet": "ControlNet",
}
# Widths of published levels with attention, whose heads are 64 wide.
PUBLISHED_WIDTHS = {"stage_c": {1536, 2048}, "stage_b": {1152, 1280}}
READERS = 4
PAGE = 4096  # bytes; where pages are larger, some are touched twice

logger = logging.getLogger(__name__)

PART_NAMES = {**KIND_NAMES, "text": "text encoder", "vision": "image encoder"}


def load_published_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Fills a network from published (or split-attention) names, strictly.

    A model on the meta device takes the tensors themselves, with no copy; any other copies their values.
    Raises CascadeError with the first missing, unexpected, misshapen and mistyped names.
    """
    weights = split_attention(state_dict)
    check_weights(model, weights)
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(weights, strict=True, assign=on_meta)
    return model


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises CascadeError unless the weights, of split attention, have a network's names, shapes and types."""
    parameters = model.state_dict()
    if any(is_ultrapixel(name) for name in weights if name not in parameters):
        raise CascadeError(
            "The weights hold the network that UltraPixel adds to Stage C (agg_net, norm_down_blocks), which is not "
            "read; choose a Stage C file without it."
        )
    pairs = [(name, tensor, parameters[name]) for name, tensor in weights.items() if name in parameters]
    problems = {
        "missing": [name for name in parameters if name not in weights],
        "unexpected": [name for name in weights if name not in parameters],
        "empty": [name for name, tensor, _ in pairs if tensor.numel() == 0],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(parameter.shape)}"
            for name, tensor, parameter in pairs
            if tensor.shape != parameter.shape
        ],
        "of another type": [
            f"{name} {tensor.dtype} instead of floating point"
            for name, tensor, parameter in pairs
            if parameter.is_floating_point() and tensor.dtype not in FLOATING
        ],
    }
    listed = [
        f"{len(names)} {problem} ({', '.join(map(printable, names[:3]))}{', …' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if listed:
        raise CascadeError(
            f"The weights do not fit {type(model).__name__}: {'; '.join(listed)}; choose a whole file of "
            "this network and size."
        )


def load_model(
    path: str | Path,
    expect: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations: Any = nn,
    read_ahead: bool = True,
    notify: Callable[[str], object] = logger.warning,
    placed: bool = False,
    eight_bit: torch.dtype | None = None,
    quantise_on: torch.device | None = None,
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Loads a network in evaluation mode from a file of any layout or a folder of diffusers: (module, kind, config).

    expect: the kind to load, since the file may hold several networks, or another one. The weights are the file's own
    pages, mapped, unless `dtype` or `device` ask for others.
    read_ahead: read them into memory now; otherwise they are read when first used.
    placed: they stay mapped; placement reads and casts them to `dtype` on their way to a device.
    notify: is told where the number of heads is a guess.
    eight_bit: the format of Stage B's and C's large weights (networks/quantisation.py): taken from a file that has
    them in this format, else quantised on the device `quantise_on`. `dtype` and `device` then apply to the other
    weights. Raises CascadeError where the file cannot be read, is not of the kind `expect`, or is not whole.
    """
    stored: dict[str, QuantisedWeight] = {}
    if expect is None:
        weights, metadata = read_safetensors(path)
    elif eight_bit is None:
        weights, metadata = read_weights(path, expect)
    else:
        weights, stored, metadata = read_quantised(path, expect)
        weights |= {name: _stand_in(weight) for name, weight in stored.items()}
    kind, config = identify(path, weights, metadata, expect)
    if kind in PUBLISHED_WIDTHS and "nhead" not in stated_config(metadata):
        levels = zip(config["c_hidden"], config["nhead"], strict=True)
        guessed = {width for width, heads in levels if heads > 0} - PUBLISHED_WIDTHS[kind]
        if guessed:
            notify(heads_notice(path, guessed))
    try:
        model = _build_on_meta(kind, config, operations)
        weights = split_attention(weights)
        check_weights(model, weights)  # before anything of the file is read
        large = {f"{name}.weight" for name, _ in quantisable(model)} if eight_bit is not None else set()
        weights |= {name: as_float(weight) for name, weight in stored.items() if name not in large}
        for name in large - stored.keys():
            if weights[name].dtype == eight_bit:  # a plain cast to 8 bits, without a scale
                stored[name] = QuantisedWeight(weights[name], torch.ones(len(weights[name])))
        if placed and eight_bit is None:
            cast_on_the_way(model, dtype)
        else:
            if read_ahead and not placed:
                _read_ahead(
                    [*(t for t in weights.values() if not t.is_meta), *(w.weight8 for w in stored.values())]
                )
            if dtype is not None or torch.device(device).type != "cpu":
                others = {name: tensor for name, tensor in weights.items() if name not in large}
                weights = {**weights, **converted(others, dtype, device)}
        model.load_state_dict(weights, strict=True, assign=True)
        if eight_bit is not None:
            quantise_network(model, eight_bit, stored, quantise_on)
    except CascadeError as error:
        raise CascadeError(f"{Path(path).name}: {error}") from error.__cause__
    return model.eval().requires_grad_(False), kind, config


def _stand_in(weight: QuantisedWeight) -> Tensor:
    """A tensor on the meta device in place of an 8-bit weight, to compare its shape with a network's."""
    return torch.empty(weight.weight8.shape, dtype=torch.bfloat16, device="meta")


def heads_notice(path: str | Path, widths: Iterable[int]) -> str:
    """A sentence about a network that states no number of heads, for which heads of 64 were assumed."""
    return (
        f"{Path(path).name} does not say how many attention heads it has, and {' and '.join(map(str, sorted(widths)))} "
        "is not a published width: heads of 64 are assumed, and with any others its pictures are wrong. Use a file "
        "that has its config in its metadata, or a folder with its config.json."
    )


def converted(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Casts floating-point weights to `dtype` (None: unchanged) and moves all to `device`; copies only if needed.

    Pages of a mapped file are dropped as soon as their tensor is copied, so that memory never holds everything twice.
    """
    files = mapped_files()

    def convert(tensor: Tensor) -> Tensor:
        copy = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        if copy is not tensor:
            forget_pages([tensor], files)
        return copy

    return {name: convert(tensor) for name, tensor in weights.items()}


def _read_ahead(weights: Iterable[Tensor]) -> None:
    """Prefetches mapped weights by several threads at once, which is faster than one on most disks.

    Weights that take more than half of the machine's memory are not prefetched.
    """
    weights = list(weights)
    if sum(tensor.nbytes for tensor in weights) > _memory() / 2:
        return
    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(_touch, weights))


def _touch(tensor: Tensor) -> None:
    """Reads one byte of every page, so that the system loads the whole tensor."""
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    size = min(tensor.nbytes, storage.nbytes() - start)
    torch.empty(0, dtype=torch.uint8).set_(storage, start, (-(-size // PAGE),), (PAGE,)).sum()


def _memory() -> int:
    """Bytes of memory that the machine has; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def identify(
    path: str | Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str], expect: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The kind and the configuration of a file's tensors.

    Raises CascadeError, naming the file, if they belong to none of the networks or not to the kind `expect`.
    """
    try:
        kind, config = infer_config(weights, metadata)
    except CascadeError as error:
        if expect is None:
            raise CascadeError(f"{Path(path).name}: {error}") from None
        expected = KIND_NAMES[expect]
        inside = [PART_NAMES[part] for part in parts_in(weights)]
        model = foreign_name(weights)
        if model is not None and len(inside) < 2:
            contents = f"is a {model}"
        elif inside and expected not in inside:
            contents = f"holds {', '.join(inside)}"
        else:
            raise CascadeError(f"{Path(path).name}: {error}") from None
        raise CascadeError(
            f"{Path(path).name} {contents}, but {expected} is expected here; choose a {expected} file."
        ) from None
    if expect is not None and kind != expect:
        raise CascadeError(
            f"{describe(path, kind, config)}, but {KIND_NAMES[expect]} is expected here; choose a "
            f"{KIND_NAMES[expect]} file, or load this one as {KIND_NAMES[kind]}."
        )
    return kind, config


def holds(path: str | Path, kind: str) -> bool:
    """Whether a file can be read and holds a network of that kind."""
    try:
        return identify(path, *read_weights(path, kind))[0] == kind
    except CascadeError:
        return False


def _build_on_meta(kind: str, config: Mapping[str, Any], operations: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return NETWORKS[kind].from_config(config, operations=operations)
    except CascadeError:
        raise
    except Exception as error:  # a config of the wrong types fails in many ways
        reason = printable(f"{error}".partition("\n")[0])
        raise CascadeError(
            f"no {KIND_NAMES[kind]} can be built from the config in its metadata ({reason}); download it "
            "again."
        ) from error


def describe(path: str | Path, kind: str, config: Mapping[str, Any]) -> str:
    """Describes a file, such as "x.safetensors is a Stage C checkpoint (width 1536)"."""
    stated = config.get("c_hidden")
    widths = stated if isinstance(stated, list | tuple) else [stated]
    numbers = [width for width in widths if isinstance(width, int)]  # a stated config may hold anything
    detail = f" (width {max(numbers)})" if numbers else ""
    return f"{Path(path).name} is a {KIND_NAMES[kind]} checkpoint{detail}"


def first_non_finite(model: nn.Module) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None.

    Reads every weight, so call it only to explain a failure.
    """
    scales = {f"{name}.weight": layer.weight_scale for name, layer in quantised_layers(model)}
    return next(non_finite({**model.state_dict(), **scales}), None)


def non_finite(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """The names of tensors that hold NaN or infinity."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            continue
        if tensor.itemsize == 1:  # torch has no isfinite for float8
            tensor = tensor.float()
        if not tensor.isfinite().all():
            yield name
