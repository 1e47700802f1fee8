"""Finetunes of Stage C, Stage B or the text encoder, whole or in part, or of Stage C and the text encoder together."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpoints import fuse_attention, write_safetensors
from ...checkpoints.attention import parts_of_fused
from ...checkpoints.carried import carried_config
from ...checkpoints.layouts import all_in_one_name
from ...errors import CascadeError, counted, quoted
from ...networks.precision import PRECISIONS
from ...networks.stage_b import StageB
from ...networks.stage_c import StageC
from ...text.clip import CONFIG_KEYS
from ...text.encoder import TextEncoder, carried_by
from ...text.known_words import WORDS
from ..cuda_graphs import GraphedFunction
from ..data.stage_b import StageBData
from ..processes import Processes
from ..settings import FinetuneSettings, ObjectiveSettings
from ..sharding import Shards
from .base import State
from .conditions import CachedText
from .names import check_patterns
from .stage_c import StageCInputs, StageCTask
from .trainable_text import TrainableText

TEXT = "text."  # prefix of the text encoder's parameters in a state that has Stage C's too


class FinetuneTask(StageCTask):
    """Networks whose trained parameters are in float32, the others and all products in `dtype`.

    stage_names   the parameters of the stage that are trained
    text_names    those of the text encoder that are trained
    """

    trained: "_ParameterSubset"

    def __init__(
        self,
        network: StageC | StageB,
        text: CachedText,
        settings: FinetuneSettings,
        objective: ObjectiveSettings,
        dtype: torch.dtype,
        stage_b: StageBData | None = None,
        encoder: TextEncoder | None = None,
        captions: Sequence[str] = (),
    ):
        """encoder: the text encoder on its device, if it is trained; captions: the data's, by id."""
        super().__init__(network, text, objective, dtype, stage_b)
        self.settings, self.encoder = settings, encoder
        self.stage_names, self.text_names = set[str](), set[str]()
        self.frozen: Callable[..., Tensor] = network  # used if only the text encoder is trained
        if settings.network != "text_encoder":
            self.stage_names = select_parameters(network, settings.modules, settings.depth)
            cast_parameters(network, self.stage_names, dtype, self.device)
            network.train()  # with dropout, as published
        if encoder is not None:
            patterns = settings.modules if settings.network == "text_encoder" else ("all",)
            self.text_names = select_parameters(encoder.model, patterns)
            self.trainable_text = TrainableText(encoder, captions)
        chosen: dict[str, nn.Parameter] = {}
        for part, names, prefix in self._parts():
            part.requires_grad_(False)
            parameters = dict(part.named_parameters())
            chosen |= {prefix + name: parameters[name] for name in parameters if name in names}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        self.trained = _ParameterSubset(chosen)

    def divide(self, processes: Processes) -> None:
        if self.scale_loss:
            raise CascadeError(
                "train.fsdp trains in bf16 or fp32, but this accelerator computes in fp16; set train.precision to fp32."
            )
        self.shards = Shards(self.network, processes, self.dtype)
        divided = self.shards.parameters.items()
        self.trained = _ParameterSubset({name: p for name, p in divided if name in self.stage_names})

    def _parts(self) -> Iterator[tuple[nn.Module, set[str], str]]:
        """The networks with trained parameters: (network, their names, the prefix of these names in a state)."""
        if self.stage_names:
            yield self.network, self.stage_names, ""
        if self.encoder is not None:
            yield self.encoder.model, self.text_names, TEXT if self.stage_names else ""

    def groups(self) -> list[dict[str, Any]]:
        if not (self.stage_names and self.text_names):
            return super().groups()
        both = self.trained.chosen.items()
        return [
            {"params": [p for name, p in both if not name.startswith(TEXT)]},
            {
                "params": [p for name, p in both if name.startswith(TEXT)],
                "share": self.settings.text_learning_rate,
            },
        ]

    def use_cuda_graphs(self) -> None:
        if not self.stage_names:
            self.frozen = GraphedFunction(self.frozen)

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        if not self.stage_names:
            with self._autocast():
                conditions = self.conditions_of(inputs)
            return self.diffusion_loss(lambda x, r: self.frozen(x.to(self.dtype), r, *conditions), inputs)
        with self._autocast() if self.encoder is not None else nullcontext():
            conditions = self.conditions_of(inputs)
        with self._autocast():
            return self.diffusion_loss(lambda x, r: self.network(x, r, *conditions), inputs)

    @property
    def described(self) -> str:
        s, parts = self.settings, []
        if self.stage_names:
            parts.append(("Stage C" if self.kind == "stage_c" else "Stage B", self.network, self.stage_names))
        if self.encoder is not None:
            parts.append(("text encoder", self.encoder.model, self.text_names))
        words = [
            f"a whole {name}, {len(names)} of its {sum(1 for _ in part.parameters())} tensors trained"
            for name, part, names in parts
        ]
        return f"{' and '.join(words)}, in {s.dtype}"

    def _autocast(self) -> torch.autocast:
        # For a divided network, autocast would keep copies in 16 bits of weights that are freed after use.
        enabled, cache = self.dtype != torch.float32, self.shards is None
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cache)

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        own = {name: value for name, value in state.items() if name in self.stage_names}

        def predict(*inputs: Tensor, **conditions: Tensor) -> Tensor:
            if self.shards is not None:
                return self.network(*inputs, **conditions)
            return functional_call(self.network, own, inputs, conditions)

        held = self.shards.holding(state) if self.shards is not None else self._text_as(state)
        self.network.eval()
        try:
            with torch.no_grad(), held, self._autocast() if own else nullcontext():
                yield predict
        finally:
            self.network.train(bool(self.stage_names))

    @contextmanager
    def _text_as(self, state: State) -> Iterator[None]:
        """Context in which the text encoder has a state's values."""
        chosen = self.trained.chosen
        names = [name for name in state if name not in self.stage_names]
        before = {name: chosen[name].data for name in names}
        for name in names:
            chosen[name].data = state[name]
        try:
            yield
        finally:
            for name, value in before.items():
                chosen[name].data = value

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes the whole network under its published names; two of them as ComfyUI's all-in-one checkpoints do."""
        if self.encoder is None:
            self._write_stage(state, path, metadata)
            return
        parts = {}
        if self.stage_names:
            weights = fuse_attention(self._weights(state, self.network, ""))
            parts[self.kind] = weights, {"kind": self.kind, "config": json.dumps(asdict(self.network.config))}
        model, tokenizer = self.encoder.model, self.encoder.tokenizer
        weights = self._weights(state, model, TEXT if self.stage_names else "")
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        config = {key: value for key, value in model.config.to_dict().items() if key in CONFIG_KEYS["text"]}
        parts["text"] = {**weights, **carried_by(config, shapes, tokenizer)}, {}
        if tokenizer.words:
            metadata = {**metadata, WORDS: json.dumps(tokenizer.words)}
        if len(parts) == 1:
            write_safetensors(path, parts["text"][0], metadata)
            return
        both = {
            all_in_one_name(part, name): value
            for part, (weights, _) in parts.items()
            for name, value in weights.items()
        }
        carried = carried_config(self.network).items()
        both |= {all_in_one_name(self.kind, name): value for name, value in carried}
        write_safetensors(path, both, metadata)

    def _weights(self, state: State, network: nn.Module, prefix: str) -> dict[str, Tensor]:
        dtype = PRECISIONS[self.settings.dtype]
        tensors = network.state_dict()
        return {
            name: state.get(prefix + name, value).to("cpu", dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
        }

    def _write_stage(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes a stage under its published names, one tensor at a time.

        For a divided network, all processes call it; the main one writes.
        """
        dtype, shards = PRECISIONS[self.settings.dtype], self.shards
        own = shards.parameters if shards is not None else self.network.state_dict()

        def value(name: str) -> Tensor:
            rows = state.get(name, own[name]).detach().to(dtype)
            return rows.cpu() if shards is None else shards.gather(name, rows)

        whole = self.network.state_dict()
        shapes = {name: torch.empty(each.shape, dtype=dtype, device="meta") for name, each in whole.items()}
        about = {**metadata, "kind": self.kind, "config": json.dumps(asdict(self.network.config))}
        fused = fuse_attention(shapes)

        def write(give: Callable[[str], Tensor]) -> None:
            write_safetensors(path, fused, about, value=lambda name: fused_value(name, give))

        if shards is None:
            write(value)
        else:
            shards.processes.serve(value, write)


def fused_value(name: str, value: Callable[[str], Tensor]) -> Tensor:
    """A tensor of `fuse_attention`'s result, made from only those tensors that it joins."""
    parts = parts_of_fused(name)
    return torch.cat([value(part) for part in parts]) if len(parts) > 1 else value(name)


def select_parameters(
    network: nn.Module, patterns: Sequence[str], depth: Sequence[float] = (0.0, 1.0)
) -> set[str]:
    """The names of the parameters in modules that match a pattern (`all`: in any module) and lie at these depths.

    depth: bounds of the blocks, as shares of a forward pass; unless they are (0, 1), only blocks are chosen.
    """
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
    if tuple(depth) == (0.0, 1.0):
        return chosen
    deep = _at_depth(network, depth)
    if not chosen & deep:
        raise CascadeError(
            f"finetune.depth {quoted(list(depth))} leaves none of the {counted(len(chosen), 'tensor')} of "
            "finetune.modules; give wider bounds."
        )
    return chosen & deep


def cast_parameters(network: nn.Module, trained: set[str], dtype: torch.dtype, device: torch.device) -> None:
    """Moves a network to the device, its trained parameters in float32 and the others in `dtype`, one by one."""
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if name in trained else dtype)
    network.to(device)


def _at_depth(network: Any, depth: Sequence[float]) -> set[str]:
    """The parameters of the blocks that begin between these two shares of a forward pass."""
    blocks = [block for blocks, _ in network.levels() for block in blocks]
    first, last = (round(bound * len(blocks)) for bound in depth)
    if depth[1] == 1:
        first = min(first, len(blocks) - 1)  # a small network's last block, however late the share begins
    inside = {id(parameter) for block in blocks[first:last] for parameter in block.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in inside}


def _inside(parameter: str, pattern: str) -> bool:
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


class _ParameterSubset(nn.Module):
    """Some of the parameters of networks, by name."""

    def __init__(self, chosen: Mapping[str, nn.Parameter]):
        super().__init__()
        self.chosen = dict(chosen)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.chosen.values())

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.chosen.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        with torch.no_grad():
            for name, parameter in self.chosen.items():
                parameter.copy_(state_dict[name])
