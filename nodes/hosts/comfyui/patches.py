# pyright: reportMissingImports=false
"""Patches that other nodes put on a MODEL, and notices about their effect.

The host itself applies most patches, in our samplers as in its own. Sentences tell the user of patches that override
a sampler's settings, and of those without effect on Stage B or C.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ....cascade_core.errors import CascadeError, excerpt, printable, quoted
from ....cascade_core.placement import out_of_memory
from ..notices import Notice

PACKAGE = __name__.partition(".nodes.hosts")[0]

# Keys in the host's transformer_options:
OURS = "cascade_"
CLONED_BY = f"{OURS}cloned_by"  # attribute of a patcher: the node that made it of another
NOTICES = f"{OURS}notices"  # the `Notices` of a run of our samplers
ATTENTION = "optimized_attention_override"  # a function in place of attention
PLACES = "patches", "patches_replace"  # functions for blocks of a network
WRAPPING = "wrappers", "callbacks"  # functions around what the host does

# The host's modules that read a MODEL's options during sampling.
READERS = {
    f"comfy.{name}"
    for name in ("samplers", "sampler_helpers", "model_patcher", "hooks", "context_windows", "multigpu")
}


class Notices:
    """The notices of a run, each given once. The host copies lists and dicts at each step, but not this object."""

    def __init__(self, notify: Callable[[str], object] | None = None):
        """notify: called with each notice at once, where nothing shows them after the run"""
        self.sentences: list[Notice] = []
        self._notify = notify

    def add(self, sentence: Notice) -> None:
        if sentence not in self.sentences:
            self.sentences.append(sentence)
            if self._notify is not None:
                self._notify(sentence)


def origin(patch: Any) -> str:
    """Name of the node that made a patch; for one made elsewhere, the name of its function or class."""
    patch = _unwrapped(patch)
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    if named.__module__.startswith(f"{PACKAGE}."):
        return "Cascade Guidance"
    return printable(named.__qualname__.partition(".")[0], 60)


def _unwrapped(patch: Any) -> Any:
    """The original function of a patch that Python or the host has wrapped."""
    while True:
        inner = [cell.cell_contents for cell in getattr(patch, "__closure__", None) or ()]
        if isinstance(patch, partial):
            patch = patch.func
        elif getattr(patch, "__qualname__", "").startswith("ModelPatcher.") and any(map(callable, inner)):
            patch = next(filter(callable, inner))
        else:
            return patch


def patches_of(options: Any) -> Iterator[Any]:
    """All functions and objects in nested options."""
    if isinstance(options, dict):
        options = list(options.values())
    if isinstance(options, list | tuple | set):
        for entry in options:
            yield from patches_of(entry)
    else:
        yield _unwrapped(options)


def has_foreign_schedule(patcher: Any) -> bool:
    """Whether the MODEL carries a schedule of another kind than Stable Cascade's."""
    schedule = patcher.get_model_object("model_sampling")
    return not isinstance(schedule, comfy.model_sampling.StableCascadeSampling)


def without_effect(options: dict[str, Any], network: str) -> Iterator[Notice]:
    """Notices for nodes that patch blocks which Stage B and C do not have.

    options: the transformer_options of a forward; network: in words
    """
    names_by_node: dict[str, dict[str, None]] = {}
    for place in PLACES:
        for name, patches in (options.get(place) or {}).items():
            for patch in patches_of(patches):
                names_by_node.setdefault(origin(patch), {})[str(name)] = None
    for node, names in names_by_node.items():
        blocks = printable(" and ".join(names), 120)
        yield Notice("blocks", node=node, blocks=blocks, network=network)


def native_without_effect(patcher: Any, network: str) -> Iterator[Notice]:
    """Notices for nodes whose wrappers the host's own Stage B and C do not call, although ours do."""
    for node in _wrapping(patcher, WrappersMP.DIFFUSION_MODEL):
        yield Notice("wrapped", node=node, network=network)


def called_for_each_tile(patcher: Any) -> Iterator[Notice]:
    """Notices for nodes whose wrappers are called once per tile, which confuses nodes that cache outputs."""
    for node in _wrapping(patcher, WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        yield Notice("tiles", node=node)


def _wrapping(patcher: Any, *kinds: str) -> list[str]:
    """Names of the nodes whose wrappers of the network are on the MODEL."""
    options = patcher.model_options["transformer_options"]
    wrappers = [
        w for kind in kinds for w in (*get_all_wrappers(kind, options), *patcher.get_all_wrappers(kind))
    ]
    return list(dict.fromkeys(map(origin, wrappers)))


def unread_by_network(patcher: Any, network: str) -> Iterator[Notice]:
    """Notices for options meant for networks that neither Stage B, Stage C nor any patch on the MODEL reads."""
    modules = _modules_of_patches(patcher)
    for key in patcher.model_options["transformer_options"]:
        if (
            key not in (*PLACES, *WRAPPING, ATTENTION)
            and not key.startswith(OURS)
            and not _any_names(modules, key)
        ):
            yield Notice("network", key=quoted(key), network=network)


def unread_by_host(patcher: Any) -> Iterator[Notice]:
    """Notices for other options that neither the host nor any patch on the MODEL reads."""
    modules = READERS | _modules_of_patches(patcher)
    for key in patcher.model_options:
        if not _any_names(modules, key):
            yield Notice("sampler", key=quoted(key))


def _modules_of_patches(patcher: Any) -> set[str]:
    everything = (patcher.model_options, patcher.wrappers, patcher.callbacks)
    return {str(getattr(patch, "__module__", "")) for patch in patches_of(everything)}


def _any_names(modules: set[str], key: Any) -> bool:
    return any(f'"{key}"' in text or f"'{key}'" in text for text in map(_source, modules))


@cache
def _source(module: str) -> str:
    """A module's source, or "" where it has none."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


# Attributes of a patcher, beside those that other nodes add, in which it may differ from the one it is a clone of.
PATCHED = (
    "patches", "object_patches", "weight_wrapper_patches", "force_cast_weights", "model_options", "attachments",
    "callbacks", "wrappers", "injections", "hook_patches", "forced_hooks", "load_device", "offload_device",
)  # fmt: skip
# Its nodes clone a MODEL that they have nothing to change on.
DEVICES_OF_MODELS = "comfy_extras.nodes_multigpu"


def cloning_node() -> str | None:
    """The name of another's node that has called a patcher's `clone`; None where it was not a node, or ours."""
    for frame in _callers(sys._getframe(2)):
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_qualname
        if "." in name and "<" not in name and not module.startswith("comfy."):
            known = module == DEVICES_OF_MODELS or module.startswith(f"{PACKAGE}.")
            return None if known else printable(name.partition(".")[0], 60)
    return None


def _callers(frame: Any) -> Iterator[Any]:
    """A frame, and those of the functions that wait for it, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def left_as_it_was(patcher: Any, network: str) -> Iterator[Notice]:
    """Notices for nodes that cloned the MODEL and put nothing on the clones, having found no block to patch.

    Not for the node that samples now, whose clone is its own.
    """
    sampling = {frame.f_code.co_qualname.partition(".")[0] for frame in _callers(sys._getframe())}
    while (parent := getattr(patcher, "parent", None)) is not None:
        node, clone = getattr(patcher, CLONED_BY, None), patcher
        while node is not None and getattr(parent, CLONED_BY, None) == node and parent.parent is not None:
            parent = parent.parent  # of the first of the node's clones
        if node is not None and node not in sampling and not _differs(clone, parent):
            yield Notice("unchanged", node=node, network=network)
        patcher = parent


def _differs(clone: Any, parent: Any) -> bool:
    """Whether something was put on a clone, an attribute or a method of its own among it."""
    own = {
        name for name in vars(clone).keys() - vars(parent)
        if callable(vars(clone)[name]) or not hasattr(type(clone), name)
    }  # fmt: skip
    return not own <= {CLONED_BY} or _carried(clone) != _carried(parent)


def _carried(patcher: Any) -> Any:
    """What is on a patcher, to be compared with another's."""
    models = {key: len(models) for key, models in patcher.additional_models.items()}
    return models, [_identities(getattr(patcher, name, None)) for name in PATCHED]


def _identities(value: Any) -> Any:
    """Nested options with the identity of each function and object in its place, which a clone shares."""
    if isinstance(value, dict):
        return {key: _identities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_identities(entry) for entry in value]
    return value if isinstance(value, str | int | float | None) else id(value)


class NetworkSettings(dict[str, Any]):
    """The host's settings of a network, with a sentence for nodes that look for another family's."""

    def __init__(self, settings: dict[str, Any], network: str):
        super().__init__(settings)
        self.network = network

    def __missing__(self, key: str) -> Any:
        raise CascadeError(
            f"This node looks for {quoted(key)} of the MODEL's network, which {self.network} does not have: it is for "
            "networks of another family; take it out of the graph."
        )


def failure(error: Exception, patcher: Any, network: str) -> CascadeError | None:
    """The error to raise if a patch on the MODEL failed; None if something else did."""
    if isinstance(error, CascadeError | comfy.model_management.OOM_EXCEPTION) or out_of_memory(error):
        return None
    patches = [
        *patches_of(patcher.model_options),
        *patches_of(patcher.wrappers),
        *patches_of(patcher.callbacks),
    ]
    by_code = {_code(patch): patch for patch in patches}
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):  # innermost first, since a wrapper is not to blame for its callee
        if str(frame.f_globals.get("__name__")).startswith(("comfy.", f"{PACKAGE}.")):
            return None
        if frame.f_code in by_code:
            return CascadeError(
                f"{origin(by_code[frame.f_code])}, which patched the MODEL, failed on {network}: "
                f"{excerpt(str(error), 200)}. It may be for other networks; take it out of the graph."
            )
    return None


def explain_failures(patcher: Any, network: str) -> None:
    """Makes a run by any sampler name the patch on the MODEL that failed."""
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{OURS}failures", partial(_explained, network))


def _explained(network: str, execute: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return execute(*arguments, **options)
    except Exception as error:
        if (explained := failure(error, execute.class_obj.model_patcher, network)) is not None:
            raise explained from error
        raise


def _code(patch: Any) -> Any:
    """The code object that runs when a patch is called."""
    called = patch if hasattr(patch, "__code__") else vars(type(patch)).get("__call__")
    return getattr(called, "__code__", None)


class OverriddenAttention(TorchFunctionMode):
    """Computes attention with the function that a node put on the MODEL, called as the host's own Stage C calls it."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        heads = args[0].shape[1]
        q, k, v = (value.transpose(1, 2).flatten(2) for value in args)  # (B, N or M, C)
        attention = comfy.ldm.modules.attention.optimized_attention
        out: Tensor = attention(q, k, v, heads, transformer_options=self.options)
        return out.unflatten(2, (heads, -1)).transpose(1, 2)
