"""A LoRA of Stage C, Stage B or the text encoder, or of Stage C with the text encoder and new tokens.

It is trained on the data, or distilled for sampling in few steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import Adapter, LearnedToken, read_adapter, to_dialect, write_adapter
from ...adapters.changes import AddedChange
from ...adapters.compatibility import check_kind
from ...adapters.tokens import name_in_prompt
from ...adapters.write import check_dialect
from ...diffusion.guidance import guide
from ...errors import CascadeError, counted
from ...networks.precision import PRECISIONS
from ...networks.stage_b import StageB
from ...networks.stage_c import StageC
from ...text.encoder import TextEncoder
from ..cuda_graphs import GraphedFunction
from ..data.stage_b import StageBData
from ..losses import consistency_loss
from ..settings import LoRASettings, ObjectiveSettings, TokenSettings
from .base import State
from .conditions import CachedText, Conditions
from .low_rank import LowRankChanges, changes_without_values, select_layers
from .stage_c import StageCInputs, StageCTask
from .textual_inversion import LearnedTokens
from .trainable_text import TrainableText


class LoRATask(StageCTask):
    """Low-rank changes, in float32, of a frozen Stage C or B in `dtype`, of a text encoder in float32, or of both.

    changes: of the stage; None if only the text encoder is trained
    """

    changes: LowRankChanges | None = None

    def __init__(
        self,
        network: StageC | StageB,
        text: CachedText,
        settings: LoRASettings,
        objective: ObjectiveSettings,
        dtype: torch.dtype,
        seed: int = 0,
        encoder: TextEncoder | None = None,
        captions: Sequence[str] = (),
        tokens: Sequence[TokenSettings] = (),
        stage_b: StageBData | None = None,
    ):
        """encoder: the text encoder on its device, if it or tokens are trained; captions: the data's, by id."""
        super().__init__(network, text, objective, dtype, stage_b)
        self.settings = settings
        generator = torch.Generator().manual_seed(seed)
        self.trained = nn.ModuleDict()
        if settings.network != "text_encoder":
            layers = select_layers(network, settings.targets)
            self.changes = LowRankChanges.of(network, layers, settings, dtype, generator).to(self.device)
            self.trained[self.kind] = self.changes
        self.student: Callable[..., Tensor] = self._changed
        self.teacher: Callable[..., Tensor] = network
        self.text_changes, self.learned = None, None
        if encoder is not None and with_text(settings):
            settings_of_text = _for_text(settings)
            layers = select_layers(encoder.model, settings_of_text.targets)
            changes = LowRankChanges.of(encoder.model, layers, settings_of_text, generator=generator)
            self.trained["text"] = self.text_changes = changes.to(self.device)
        if encoder is not None:
            self.trainable_text = TrainableText(encoder, captions)
            if tokens:
                self.learned = LearnedTokens(tokens, encoder, captions).to(self.device)
                self.trained["tokens"] = self.learned
                self.trainable_text = self.learned.trainable_text(encoder, captions)
        if settings.start is not None:
            begin_as(read_start(settings.start, network), self.changes, self.text_changes)
        # Raises CascadeError for a dialect that cannot hold the LoRA, now rather than after the run.
        to_dialect(self.adapter(self.trained.state_dict(), "the LoRA"), settings.dialect, self._numbered)

    def groups(self) -> list[dict[str, Any]]:
        groups = self.changes.groups() if self.changes is not None else []
        if self.text_changes is not None:
            alone = self.changes is None
            groups += self.text_changes.groups(1.0 if alone else self.settings.text_learning_rate)
        if self.learned is not None:
            groups.append(self.learned.group(self.settings.token_learning_rate))
        return groups

    @property
    def _numbered(self) -> StageC | None:
        """The network whose layers the official dialect numbers."""
        return self.network if isinstance(self.network, StageC) else None

    def use_cuda_graphs(self) -> None:
        self.student = GraphedFunction(self.student)
        self.teacher = GraphedFunction(self.teacher)

    @property
    def described(self) -> str:
        text, tokens = self.text_changes, self.learned
        stage = "Stage C" if self.kind == "stage_c" else "Stage B"
        parts = (
            [f"{counted(len(self.changes.layers), 'layer')} of {stage}"] if self.changes is not None else []
        )
        parts += [f"{counted(len(text.layers), 'layer')} of the text encoder"] if text is not None else []
        parts += [counted(len(tokens.counts), "learned token")] if tokens is not None else []
        s = self.settings
        return f"a LoRA of rank {s.rank} of {' and '.join(parts)}, as {s.dialect} writes it, in {s.dtype}"

    def _changed(self, vector: Tensor, *inputs: Tensor) -> Tensor:
        """inputs: the layers that are kept, where some are not; the network's"""
        assert self.changes is not None
        kept, inputs = (inputs[0], inputs[1:]) if self.changes.dropout.layer else (None, inputs)
        with self.changes.applied(vector, kept):
            return self.network(*inputs)

    def _predict(self, x: Tensor, r: Tensor, *conditions: Tensor) -> Tensor:
        """The noise predicted by the network, with its changes unless only the text encoder has some."""
        x = x.to(self.dtype)
        if self.changes is None:
            return self.teacher(x, r, *conditions)
        kept = self.changes.draw_layers()
        return self.student(self.changes.values(), *([] if kept is None else [kept]), x, r, *conditions)

    def loss(self, inputs: StageCInputs) -> dict[str, Tensor]:
        if self.objective.kind == "consistency":
            return self._consistency(inputs)
        text = self.text_changes
        with text.applied(kept=text.draw_layers()) if text is not None else nullcontext():
            conditions = self.conditions_of(inputs)
        return self.diffusion_loss(lambda x, r: self._predict(x, r, *conditions), inputs)

    def _consistency(self, inputs: StageCInputs) -> dict[str, Tensor]:
        """Consistency distillation; the teacher is the same Stage C without the changes, guided."""
        o, x0 = self.objective, inputs.latents
        conditions = self.conditions(self.text_of(inputs), inputs.image_prompts)
        # Id 0 is the empty caption.
        without_words = self.conditions(self.text(torch.zeros(len(x0), dtype=torch.long)))
        both = Conditions(
            *(torch.cat(_same_length(pair)) for pair in zip(conditions, without_words, strict=True))
        )
        low, high = o.guidance[0], o.guidance[-1]
        cfgs = (low + (high - low) * torch.rand(len(x0))).tolist() if low != high else [low]

        def predict(x: Tensor, r: Tensor) -> Tensor:
            return self._predict(x, r, *conditions)

        def teacher(x: Tensor, r: Tensor) -> Tensor:
            cond, uncond = self.teacher(x.to(self.dtype).repeat(2, 1, 1, 1), r.repeat(2), *both).chunk(2)
            parts = zip(cond.chunk(len(cfgs)), uncond.chunk(len(cfgs)), cfgs, strict=True)
            return torch.cat([guide(c, u, cfg, o.cfg_rescale) for c, u, cfg in parts])

        weights = o.max_loss_weight, o.pure_noise_share, self.loss_weight
        return consistency_loss(
            predict, teacher, x0, o.solver_steps, *weights, o.shift, o.sampling_steps, o.on_policy_share
        )

    @contextmanager
    def using(self, state: State) -> Iterator[Callable[..., Tensor]]:
        with ExitStack() as stack, torch.no_grad():
            self.trained.eval()
            stack.callback(self.trained.train)
            if self.changes is not None:
                stack.enter_context(self.changes.applied(self.changes.values(state, f"{self.kind}.")))
            if self.text_changes is not None:
                stack.enter_context(self.text_changes.applied(self.text_changes.values(state, "text.")))
            if self.learned is not None:
                stack.enter_context(self.learned.replaced(state["tokens.vectors"]))
            yield self.network

    def write(self, state: State, path: Path, metadata: Mapping[str, str]) -> None:
        adapter = self.adapter(state, path.name)
        write_adapter(path, adapter, adapter.dialect, self._numbered, metadata=metadata)

    def adapter(self, state: State, name: str) -> Adapter:
        """The trained changes and tokens as an adapter of that name."""
        text, learned, dtype = self.text_changes, self.learned, PRECISIONS[self.settings.dtype]
        changes = self.changes
        stages: dict[str, Any] = {}
        if changes is not None:
            stages[self.kind] = changes.as_adapter(changes.values(state, f"{self.kind}.").to(dtype))
        return Adapter(
            name,
            self.settings.dialect,
            **stages,
            text=text.as_adapter(text.values(state, "text.").to(dtype)) if text is not None else {},
            tokens=learned.tokens(state["tokens.vectors"].detach().cpu()) if learned is not None else (),
        )


def check_lora(
    settings: LoRASettings,
    tokens: Sequence[TokenSettings],
    network: StageC | StageB,
    encoder: TextEncoder,
) -> None:
    """Raises CascadeError where the networks have no such layers or rank, or the dialect cannot hold the LoRA."""
    kind = "stage_b" if isinstance(network, StageB) else "stage_c"
    changes: dict[str, Any] = {}
    if settings.network != "text_encoder":
        layers = select_layers(network, settings.targets)
        changes[kind] = changes_without_values(network, layers, settings)
    if with_text(settings):
        settings_of_text = _for_text(settings)
        layers = select_layers(encoder.model, settings_of_text.targets)
        changes["text"] = changes_without_values(encoder.model, layers, settings_of_text)
    if settings.start is not None:
        check_kind(read_start(settings.start, network), kind)
    width = encoder.model.config.hidden_size
    learned = tuple(
        LearnedToken(name_in_prompt(token.name), torch.empty(token.vectors, width, device="meta"))
        for token in tokens
    )
    check_dialect(Adapter("the LoRA", settings.dialect, **changes, tokens=learned), settings.dialect)


def with_text(settings: LoRASettings) -> bool:
    """Whether the text encoder is changed, alone or beside Stage C."""
    return settings.text_encoder or settings.network == "text_encoder"


def read_start(path: str, network: StageC | StageB) -> Adapter:
    return read_adapter(path, network if isinstance(network, StageC) else None)


def _for_text(settings: LoRASettings) -> LoRASettings:
    """The text encoder's settings, without patterns of Stage C's names."""
    if settings.network == "text_encoder":
        return settings
    targets = tuple(_text_targets(settings.targets))
    return replace(settings, targets=targets, ranks=_general(settings.ranks), rates=_general(settings.rates))


def _general(values: Mapping[str, Any]) -> dict[str, Any]:
    return {pattern: value for pattern, value in values.items() if pattern in ("all", "attention")}


def begin_as(adapter: Adapter, changes: LowRankChanges | None, text: LowRankChanges | None) -> None:
    """Starts from a file's changes. Raises CascadeError for changes that would be lost."""
    if adapter.tokens or (adapter.text and text is None):
        part = "learned tokens" if adapter.tokens else "changes of the text encoder"
        raise CascadeError(
            f"lora.start: {adapter.name} holds {part}, which would be lost; give text_encoder: true, or a file of "
            "Stage C's changes alone."
        )
    if adapter.diffusion and changes is None:
        raise CascadeError(
            f"lora.start: {adapter.name} changes Stage C or B, which would be lost; give network: stage_c with "
            "text_encoder: true, or a file of the text encoder's changes alone."
        )
    for each, own in ((adapter.diffusion, changes), (adapter.text, text)):
        other = [change.algorithm for change in each.values() if not isinstance(change, AddedChange)]
        if other:
            raise CascadeError(
                f"lora.start: {adapter.name} has changes by {other[0]}, which are not trained here; give a LoRA, LoHa "
                "or LoKr."
            )
        if own is not None:
            own.begin_as({name: c for name, c in each.items() if isinstance(c, AddedChange)}, adapter.name)


def _text_targets(targets: Sequence[str]) -> Sequence[str]:
    """The text encoder's targets: all layers, if patterns of Stage C's names are given."""
    return targets if set(targets) <= {"all", "attention"} else ("all",)


def _same_length(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Repeats the states (B, T, C) of the shorter one, the empty caption, up to the chunks of the longer.

    Likewise the zeros of an absent image prompt, if there are several image prompts.
    """
    long, short = pair
    return long, short.repeat(1, long.shape[1] // short.shape[1], 1) if long.shape != short.shape else short
