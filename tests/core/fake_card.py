"""A card that is not NVIDIA's, simulated in main memory: a device of its own, with the faults that Apple's has.

Tensors on it hold their values in main memory. What such cards cannot compute raises here: float64, values beside
others that are in main memory; and what Apple's computes wrongly without a word: a number taken from a tensor in main
memory by index (pytorch issue 191929), values of part of a tensor cast on their way to main memory (194344), and
memory read as another type.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What torch asks of a kind of device; it does not say how much memory is free."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws no numbers."""

    def get_rng_state(self, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        """It draws no numbers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


_setup_privateuseone_for_python_backend("fakecard", backend_module=_Module())
DEVICE = torch.device("fakecard", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _OnCard(Tensor):
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "_OnCard":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _Making(TorchFunctionMode):
    """`torch.tensor(…, device=…)` makes a tensor in main memory and moves it, past any dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class FakeCard(TorchDispatchMode):
    """Inside the block there is such a card. computed: how many operations it has computed"""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0
        self._making = _Making()

    def __enter__(self) -> "FakeCard":
        self._making.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._making.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = _compute(func, args, kwargs or {})
        self.computed += any(isinstance(leaf, _OnCard) for leaf in tree_leaves(result))
        return result


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _OnCard)]
    asked = kwargs.get("device")
    on_card = torch.device(asked) == DEVICE if asked is not None else bool(there)
    if func is torch.ops.aten.copy_.default:
        on_card = isinstance(args[0], _OnCard)
    if there:
        _check(func, args, kwargs, tensors)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if on_card else asked, "pin_memory": None}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    args, kwargs = tree_map_only(_OnCard, lambda tensor: tensor.values, (args, kwargs))
    if any(isinstance(a, torch.device) and a == DEVICE for a in tree_leaves((args, kwargs))):
        on_card = True
        args, kwargs = tree_map_only(torch.device, lambda device: torch.device("cpu"), (args, kwargs))
    result = func(*args, **kwargs)
    if not on_card:
        return result
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func}: the card has no {leaf.dtype}.")
    return tree_map_only(Tensor, _OnCard, result)


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    if func is torch.ops.aten.view.dtype:
        raise RuntimeError("The card's memory is read as another type.")
    if func in COPIES:
        source = args[-1] if func is COPIES[1] else args[0]
        target = args[0].dtype if func is COPIES[1] else kwargs.get("dtype") or source.dtype
        leaves = func is COPIES[1] and not isinstance(args[0], _OnCard)
        leaves = leaves or (kwargs.get("device") is not None and torch.device(kwargs["device"]) != DEVICE)
        if isinstance(source, _OnCard) and leaves and target != source.dtype and source.storage_offset():
            raise RuntimeError("A part of a tensor is cast on its way from the card.")
        return
    if func is torch.ops.aten.index.Tensor:  # its indices may be in main memory
        return
    for tensor in tensors:
        if not isinstance(tensor, _OnCard):
            if tensor.ndim:
                raise RuntimeError(f"{func}: tensors on the card and in main memory.")
            if tensor.storage_offset():
                raise RuntimeError(f"{func}: a number by its place in a tensor in main memory.")
