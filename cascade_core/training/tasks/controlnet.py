"""A ControlNet of a frozen Stage C, from hints that are computed from the pictures."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpoints import load_model, write_safetensors
from ...errors import CascadeError, counted, printable
from ...hints.kinds import KINDS
from ...networks.compressor import SemanticCompressor
from ...networks.config import PUBLISHED_BLOCKS, ControlNetConfig
from ...networks.controlnet import ControlNet
from ...networks.stage_c import StageC
from ..cuda_graphs import GraphedFunction
from ..data.batches import Batch
from ..data.hints import FindFaces, Tools, hint_maker
from ..settings import ControlNetSettings, ObjectiveSettings
from .base import State
from .conditions import CachedText, Conditions
from .stage_c import StageCInputs, StageCTask

MAX_WEIGHTS = 4_000_000_000  # about as many as the largest Stage C has
CONDITIONS = len(Conditions._fields)


class ControlNetTask(StageCTask):
    """The ControlNet in float32, its products in `dtype`; Stage C frozen, wholly in `dtype`.

    Batch norms keep their loaded statistics, as published, unless the backbone starts from random weights.
    """

    with_images = True

    def __init__(
        self,
        stage_c: StageC,
        text: CachedText,
        settings: ControlNetSettings,
        objective: ObjectiveSettings,
        dtype: torch.dtype,
        seed: int = 0,
        compressor: SemanticCompressor | None = None,
        find_faces: FindFaces | None = None,
    ):
        """compressor: on its device; given if the backbone or the hint needs it."""
        super().__init__(stage_c, text, objective, dtype)
        self.make_hint = hint_maker(settings)
        self.tools = Tools(compressor if settings.hint == "super_resolution" else None, find_faces)
        torch.manual_seed(seed)
        network = build_controlnet(settings, stage_c, compressor)
        network = network.to(self.device).requires_grad_(True)
        self.trained = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.trained.train(settings.start == "random")
        self.controlled: Callable[..., Tensor] = self._controlled

    def prepare(self, batch: Batch, generator: torch.Generator) -> StageCInputs:
        assert batch.images is not None
        images = batch.images.to(self.device).float() / 255
        hint = self.make_hint(images, generator, self.tools)
        return self.inputs(batch, hint)

    @property
    def described(self) -> str:
        config: Any = self.trained.config
        return f"a ControlNet with {counted(len(config.proj_blocks), 'output')} for a Stage C of width {config.c_proj}"

    def use_cuda_graphs(self) -> None:
        config: Any = self.trained.config
        if not (self.trained.training and config.drop_path):  # a graph would drop the same blocks each time
            self.controlled = GraphedFunction(self.controlled)

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        assert inputs.hint is not None
        others = inputs.hint, *self.conditions_of(inputs)

        def predict(x: Tensor, r: Tensor) -> Tensor:
            return self.controlled(x.to(self.dtype), r, *others, *self.trained.parameters())

        return self.diffusion_loss(predict, inputs)

    def _controlled(self, x: Tensor, r: Tensor, hint: Tensor, *others: Tensor) -> Tensor:
        """others: Stage C's conditions, then the ControlNet's parameters."""
        conditions, values = others[:CONDITIONS], others[CONDITIONS:]
        names = (name for name, _ in self.trained.named_parameters())
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            residuals = functional_call(self.trained, dict(zip(names, values, strict=True)), hint)
        return self.stage_c(x, r, *conditions, control=residuals)

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        """Context with Stage C and the ControlNet, called with a `hint` besides Stage C's own arguments."""

        def predict(x: Tensor, r: Tensor, hint: Tensor, **conditions: Tensor) -> Tensor:
            return self.stage_c(x, r, **conditions, control=functional_call(self.trained, dict(state), hint))

        training = self.trained.training
        self.trained.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                yield predict
        finally:
            self.trained.train(training)

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        write_controlnet(path, self.trained.config, state, metadata)  # pyright: ignore[reportArgumentType]


def write_controlnet(
    path: Path, config: ControlNetConfig, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a ControlNet's file in half precision."""
    tensors = {name: _half(value).contiguous().cpu() for name, value in state.items()}
    header = {**metadata, "kind": "controlnet", "config": json.dumps(asdict(config))}
    write_safetensors(path, tensors, header)


def _half(value: Tensor) -> Tensor:
    """A tensor in half precision, unless a value exceeds its range, as a batch norm's variance may."""
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if bool(half.isfinite().all()) else value


def build_controlnet(
    settings: ControlNetSettings, stage_c: StageC, compressor: SemanticCompressor | None
) -> ControlNet:
    """Builds a ControlNet for Stage C by the settings, with an output of zero; or loads the one to go on from."""
    if settings.start not in ("compressor", "random"):
        network, _, _ = load_model(settings.start, expect="controlnet", dtype=torch.float32)
        assert isinstance(network, ControlNet)
        _check_fits(network, stage_c, settings.start)
        return network
    kind = KINDS[settings.hint]
    defaults: dict[str, Any] = {
        "c_in": kind.channels,
        "c_proj": stage_c.config.c_hidden[0],
        "proj_blocks": published_blocks(stage_c),
        "bottleneck_mode": kind.backbone,
    }
    from_compressor = settings.start == "compressor" and kind.backbone == "effnet"
    if from_compressor and compressor is not None:
        config = compressor.config
        defaults |= {"stem": config.stem, "stages": config.stages, "c_last": config.c_last}
    try:
        network = ControlNet.from_config({**defaults, **settings.config})
    except CascadeError as error:
        raise CascadeError(f"controlnet.config: {error}") from None
    if from_compressor and compressor is not None:
        copy_backbone(network, compressor)
    _check_fits(network, stage_c, "controlnet.config")
    return network


def check_controlnet(settings: ControlNetSettings, stage_c: StageC, compressor: SemanticCompressor) -> None:
    """Raises CascadeError unless the settings describe a ControlNet for this Stage C; no weights are made or read."""
    if settings.start not in ("compressor", "random"):
        network, _, _ = load_model(settings.start, expect="controlnet", read_ahead=False)
        _check_fits(network, stage_c, settings.start)
        return
    try:
        with torch.device("meta"):
            network = build_controlnet(settings, stage_c, compressor)
    except CascadeError:
        raise
    except Exception as error:  # wrong types fail in many ways
        raise CascadeError(
            f"controlnet.config: no ControlNet can be built of it ({printable(' '.join(str(error)[:200].split()))}); "
            "leave it out for the published one."
        ) from None
    size = sum(parameter.numel() for parameter in network.parameters())
    if size > MAX_WEIGHTS:
        raise CascadeError(
            f"controlnet.config makes a network of {size:,} weights, but at most {MAX_WEIGHTS:,} are expected; give "
            "smaller numbers."
        )


def published_blocks(stage_c: StageC) -> list[int]:
    """The published choice of 8 of 64 residual blocks, for any number: spread over the first and last quarter."""
    down, up = stage_c.config.blocks
    count = sum(down) + sum(up)
    if count <= len(PUBLISHED_BLOCKS[8]):
        return list(range(count))
    return [round(block * (count - 1) / 63) for block in PUBLISHED_BLOCKS[8]]


def copy_backbone(network: ControlNet, compressor: SemanticCompressor) -> None:
    """Copies the compressor's weights. For a hint of other channels, the first layer's weights are summed over the
    colours.

    Raises CascadeError where the config describes a backbone of other sizes.
    """
    target, source = network.backbone.state_dict(), compressor.backbone.state_dict()
    first = "0.0.weight"  # (C, c_in, 3, 3)
    differing = [
        name for name, value in source.items() if name != first and target[name].shape != value.shape
    ]
    if differing or target.keys() != source.keys():
        raise CascadeError(
            f"controlnet.config makes a backbone of other sizes than the compressor's ({', '.join(differing[:3])}); "
            "leave stem, stages and c_last out, or begin with `start: random`."
        )
    if target[first].is_meta:  # only the sizes are checked
        return
    channels = target[first].shape[1]
    if channels != 3:
        weight = torch.zeros_like(target[first])
        weight[:, : min(channels, 3)] = source[first][:, : min(channels, 3)]
        if channels == 1:
            weight = source[first].sum(1, keepdim=True).to(weight)  # a grey picture has three equal colours
        source = {**source, first: weight}
    network.backbone.load_state_dict(source)


def _check_fits(network: nn.Module, stage_c: StageC, where: str) -> None:
    config: Any = network.config
    count = sum(map(sum, stage_c.config.blocks))
    if max(config.proj_blocks) >= count:
        raise CascadeError(
            f"{where} has an output for block {max(config.proj_blocks)}, but this Stage C has blocks 0 to {count - 1}; "
            "give a ControlNet for these."
        )
    if config.c_proj != stage_c.config.c_hidden[0]:
        raise CascadeError(
            f"{where} gives {config.c_proj} channels, but this Stage C has {stage_c.config.c_hidden[0]}; choose one "
            "made for it."
        )
