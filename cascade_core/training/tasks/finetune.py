"""Stage C itself, whole or in part."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpoints import fuse_attention, write_safetensors
from ...checkpoints.attention import parts_of_fused
from ...errors import CascadeError, quoted
from ...networks.precision import PRECISIONS
from ...networks.stage_c import StageC
from ..processes import Processes
from ..settings import FinetuneSettings, ObjectiveSettings
from ..sharding import Shards
from .base import State
from .conditions import CachedText
from .names import check_patterns
from .stage_c import StageCInputs, StageCTask


class FinetuneTask(StageCTask):
    """Stage C, its trained parameters in float32, the others and all products in `dtype`."""

    def __init__(
        self,
        stage_c: StageC,
        text: CachedText,
        settings: FinetuneSettings,
        objective: ObjectiveSettings,
        dtype: torch.dtype,
    ):
        super().__init__(stage_c, text, objective, dtype)
        self.settings = settings
        self.names = select_parameters(stage_c, settings.modules)
        for name, parameter in stage_c.named_parameters():
            chosen = name in self.names
            parameter.data = parameter.data.to(torch.float32 if chosen else dtype)
            parameter.requires_grad_(chosen)
        stage_c.train()  # with dropout, as published
        self.trained = _ParameterSubset(dict(stage_c.named_parameters()), self.names)

    def divide(self, processes: Processes) -> None:
        if self.scale_loss:
            raise CascadeError(
                "train.fsdp trains in bf16 or fp32, but this accelerator computes in fp16; set train.precision to fp32."
            )
        self.shards = Shards(self.stage_c, processes)
        self.trained = _ParameterSubset(self.shards.parameters, self.names)

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        conditions = self.conditions(self.text_of(inputs), inputs.image_prompts)
        with self._autocast():
            return self.diffusion_loss(lambda x, r: self.stage_c(x, r, *conditions), inputs)

    @property
    def described(self) -> str:
        count = sum(1 for _ in self.stage_c.parameters())
        return f"a whole Stage C, {len(self.names)} of its {count} tensors trained, in {self.settings.dtype}"

    def _autocast(self) -> torch.autocast:
        # Of a network that is divided, the weights in 16 bits would be kept though the gathered ones are let go.
        enabled, cache = self.dtype != torch.float32, self.shards is None
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cache)

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        def predict(*inputs: Tensor, **conditions: Tensor) -> Tensor:
            if self.shards is not None:
                return self.stage_c(*inputs, **conditions)
            return functional_call(self.stage_c, dict(state), inputs, conditions)

        held = self.shards.holding(state) if self.shards is not None else nullcontext()
        self.stage_c.eval()
        try:
            with torch.no_grad(), self._autocast(), held:
                yield predict
        finally:
            self.stage_c.train()

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the whole network under its published names, one tensor at a time.

        All processes of a network that is divided call it; the main one writes.
        """
        dtype, shards = PRECISIONS[self.settings.dtype], self.shards
        own = shards.parameters if shards is not None else self.stage_c.state_dict()

        def value(name: str) -> Tensor:
            rows = state.get(name, own[name]).detach().to(dtype)
            return rows.cpu() if shards is None else shards.gather(name, rows)

        whole = self.stage_c.state_dict()
        shapes = {name: torch.empty(each.shape, dtype=dtype, device="meta") for name, each in whole.items()}
        about = {**metadata, "kind": "stage_c", "config": json.dumps(asdict(self.stage_c.config))}
        fused = fuse_attention(shapes)

        def write(give: Callable[[str], Tensor]) -> None:
            write_safetensors(path, fused, about, value=lambda name: fused_value(name, give))

        if shards is None:
            write(value)
        else:
            shards.processes.serve(value, write)


def fused_value(name: str, value: Callable[[str], Tensor]) -> Tensor:
    """A tensor of `fuse_attention`, made of those alone that it holds."""
    parts = parts_of_fused(name)
    return torch.cat([value(part) for part in parts]) if len(parts) > 1 else value(name)


def select_parameters(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The names of the parameters that lie in modules of these names; all of them for `all`."""
    names = [name for name, _ in network.named_parameters()]
    check_patterns(patterns, "finetune.modules")
    chosen: set[str] = set()
    for pattern in patterns:
        matches = names if pattern == "all" else [n for n in names if _inside(n, pattern)]
        if not matches:
            raise CascadeError(
                f"finetune.modules: {quoted(pattern)} matches no module of {type(network).__name__}; give all, or "
                f"patterns of names such as {names[len(names) // 2].rpartition('.')[0]}."
            )
        chosen |= set(matches)
    return chosen


def _inside(parameter: str, pattern: str) -> bool:
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


class _ParameterSubset(nn.Module):
    """Some of a network's parameters under their own names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], names: set[str]):
        super().__init__()
        self.chosen = {name: p for name, p in parameters.items() if name in names}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.chosen.values())

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.chosen.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        with torch.no_grad():
            for name, parameter in self.chosen.items():
                parameter.copy_(state_dict[name])
