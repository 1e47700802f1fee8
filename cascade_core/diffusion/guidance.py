"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) with the standard-deviation rescale of
Lin et al. 2023 (arXiv 2305.08891, section 3.4), here on the epsilon prediction as in the published code."""

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..errors import CascadeError
from .schedule import at_least_float32

# Argument of the model -> Tensor (B or 1, …), a list of Tensor and None, or None.
Conditions = Mapping[str, Any]


def guide(cond: Tensor, uncond: Tensor, cfg: float, cfg_rescale: float) -> Tensor:
    """The guided prediction (B, C, H, W), in float32, from the predictions with and without the prompt.

    cfg 1 is `cond` itself.  `cfg_rescale` in [0, 1] (published name `cfg_rho`) blends in the prediction rescaled to
    the standard deviation of `cond`.  The deviation is computed per image, so that an image does not depend on its
    batch; the published code computes it over the whole batch.
    """
    check_guidance(cfg, cfg_rescale)
    cond, uncond = at_least_float32(cond), at_least_float32(uncond)
    guided = torch.lerp(uncond, cond, cfg)
    if cfg_rescale == 0:
        return guided
    one_image = tuple(range(1, cond.dim()))
    std_cond = cond.std(one_image, keepdim=True)  # (B, 1, 1, 1)
    std_guided = guided.std(one_image, keepdim=True)
    return cfg_rescale * (guided * std_cond / (std_guided + 1e-9)) + guided * (1 - cfg_rescale)


class Guider:
    """A model with its prompts: `guider(x, noise_cond) -> epsilon` (B, C, H, W) in float32, noise_cond: (B,).

    `positive` and `negative` hold the model's arguments by name.  A value is a tensor with B rows, or with
    one row that serves every image, a list of such tensors (ControlNet residuals), or None.  A value that one
    side lacks becomes zeros, which None means to the networks.  Both run in one batch of 2B, or one
    after the other where their shapes differ (prompts of different length).  Without `negative`, or with cfg
    1, only `positive` runs, in a batch of B.

    The model gets x and the conditions in `dtype`, by default that of its weights, but noise_cond and other
    conditions of one number per image (B,) in float32: they become timestep embeddings.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        positive: Conditions,
        negative: Conditions | None = None,
        cfg: float = 1.0,
        cfg_rescale: float = 0.7,
        dtype: torch.dtype | None = None,
    ):
        check_guidance(cfg, cfg_rescale)
        self.model, self.cfg, self.cfg_rescale = model, cfg, cfg_rescale
        self.dtype = dtype or _weights_dtype(model)
        self.positive = positive
        self.negative = None if cfg == 1 else negative
        self._prepared_for: tuple[int, torch.device] | None = None  # batch and device of `_conditions`
        self._conditions: list[dict[str, Any]] = []  # for each forward of a step

    def __call__(self, x: Tensor, noise_cond: Tensor) -> Tensor:
        if self._prepared_for != (len(x), x.device):
            self._prepared_for, self._conditions = (len(x), x.device), self._prepare(x)
        if self.negative is None:
            return self._predict(x, noise_cond, self._conditions[0])
        if len(self._conditions) == 1:
            both = self._predict(torch.cat([x, x]), noise_cond.repeat(2), self._conditions[0])
            cond, uncond = both.chunk(2)
        else:
            cond, uncond = (self._predict(x, noise_cond, conditions) for conditions in self._conditions)
        return guide(cond, uncond, self.cfg, self.cfg_rescale)

    def _predict(self, x: Tensor, noise_cond: Tensor, conditions: dict[str, Any]) -> Tensor:
        return at_least_float32(self.model(x.to(self.dtype), noise_cond, **conditions))

    def _prepare(self, x: Tensor) -> list[dict[str, Any]]:
        """The conditions of each forward, made once: they stay the same through all steps."""
        cond = {name: _for_batch(name, entry, x, self.dtype) for name, entry in self.positive.items()}
        if self.negative is None:
            return [cond]
        uncond = {name: _for_batch(name, entry, x, self.dtype) for name, entry in self.negative.items()}
        pairs = {name: _fill(cond.get(name), uncond.get(name)) for name in cond | uncond}
        if all(_same_shape(*pair) for pair in pairs.values()):
            return [{name: _join(*pair) for name, pair in pairs.items()}]
        return [{name: pair[side] for name, pair in pairs.items()} for side in (0, 1)]


def check_guidance(cfg: float, cfg_rescale: float) -> None:
    """Raises CascadeError for strengths of guidance out of range."""
    if not math.isfinite(cfg):
        raise CascadeError(f"cfg is {cfg}; it must be a finite number (1 means no guidance, 4 is usual).")
    if not 0 <= cfg_rescale <= 1:
        raise CascadeError(
            f"cfg_rescale is {cfg_rescale}; it must be within 0 (off) and 1 (full); 0.7 is usual."
        )


def _weights_dtype(model: Callable[..., Tensor]) -> torch.dtype:
    parameters = model.parameters() if hasattr(model, "parameters") else ()
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), torch.float32)


# An entry of the conditions is a tensor, a list of entries, or None


def _for_batch(name: str, entry: Any, x: Tensor, dtype: torch.dtype) -> Any:
    """The entry with a row for each image of x, without a copy where one row serves all."""
    if entry is None:
        return None
    if isinstance(entry, (list, tuple)):
        return [_for_batch(name, value, x, dtype) for value in entry]
    if entry.dim() == 0 or len(entry) not in (1, len(x)):
        rows = len(entry) if entry.dim() else "no"
        raise CascadeError(
            f"{name} has {rows} rows for a batch of {len(x)}; give one row, or one for each image."
        )
    one_number_per_image = entry.dim() == 1
    entry = entry.to(device=x.device, dtype=torch.float32 if one_number_per_image else dtype)
    return entry.expand(len(x), *entry.shape[1:])


def _fill(cond: Any, uncond: Any) -> tuple[Any, Any]:
    """Both sides with the same structure; what one of them lacks is zeros."""
    if isinstance(cond, list) or isinstance(uncond, list):
        pairs = [_fill(*pair) for pair in zip_longest(cond or [], uncond or [])]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if cond is None and uncond is not None:
        return torch.zeros_like(uncond), uncond
    if uncond is None and cond is not None:
        return cond, torch.zeros_like(cond)
    return cond, uncond


def _same_shape(cond: Any, uncond: Any) -> bool:
    if isinstance(cond, list):
        return all(map(_same_shape, cond, uncond))
    return cond is None or cond.shape == uncond.shape


def _join(cond: Any, uncond: Any) -> Any:
    if isinstance(cond, list):
        return [_join(*pair) for pair in zip(cond, uncond, strict=True)]
    return None if cond is None else torch.cat([cond, uncond])
