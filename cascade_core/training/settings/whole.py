"""A whole settings file, and checks across its sections."""

import dataclasses
import json
from dataclasses import dataclass, field

from ...errors import CascadeError
from ..presets import PresetName
from .data import DataSettings
from .models import ModelSettings
from .objective import ObjectiveSettings
from .output import OutputSettings, SamplePrompt
from .tasks import (
    ControlNetSettings,
    FinetuneSettings,
    LoRASettings,
    Network,
    StageBSettings,
    TaskName,
    TokenSettings,
)
from .train import TrainSettings
from .validation import ValidationSettings


@dataclass(frozen=True)
class Settings:
    """A whole file; `task` is the command's."""

    task: TaskName
    data: DataSettings
    output: OutputSettings
    models: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoRASettings = field(default_factory=LoRASettings)
    controlnet: ControlNetSettings = field(default_factory=ControlNetSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    tokens: tuple[TokenSettings, ...] = ()
    stage_b: StageBSettings = field(default_factory=StageBSettings)
    preset: PresetName | None = None  # defaults for a card's memory, already merged into the sections

    def __post_init__(self) -> None:
        if self.task == "tokens" and not self.tokens:
            raise CascadeError(
                "tokens is missing; name at least one, as `tokens: [{name: '[blob]', initial: star}]`."
            )
        if self.train.optimizer == "prodigy" and len(rates := self.rate_factors()) > 1:
            raise CascadeError(
                f"prodigy has one rate for all that is trained, but here are several ({', '.join(sorted(rates))} of "
                "it); give 1 for each, or choose another optimizer."
            )
        if self.task == "finetune" and self.network != "text_encoder" and self.train.base_weights != "full":
            raise CascadeError(
                f"train.base_weights is {self.train.base_weights}, but finetune trains those weights themselves; "
                "train a LoRA, or leave it out."
            )
        if self.train.fsdp and (
            self.task != "finetune" or self.network == "text_encoder" or self.text_with_stage_c
        ):
            raise CascadeError(
                f"train.fsdp divides a Stage C or B that is trained itself and alone, but {self.task} trains something "
                "else here; leave it out."
            )
        self._check_network()
        if self.output.raw and (not self.train.ema or self.train.optimizer == "schedulefree"):
            raise CascadeError(
                "output.raw writes the weights beside their average, but train.ema makes none here; leave it out."
            )
        if self.objective.kind == "consistency":
            self._check_consistency()
        if self.output.sample_every and not (self.output.prompts or self.output.prompts_file):
            raise CascadeError(
                "output.sample_every makes pictures of output.prompts; give them, or leave it at 0."
            )
        if (self.models.stage_b is None) != (self.models.stage_a is None):
            raise CascadeError(
                "models.stage_b and models.stage_a make samples together; give both, or neither."
            )
        sized = any(isinstance(each, SamplePrompt) and each.size for each in self.output.prompts)
        if self.task == "controlnet" and sized:
            raise CascadeError(
                "output.prompts: the samples of a ControlNet have the size of its hints; leave size out."
            )

    def _check_consistency(self) -> None:
        """Raises CascadeError for settings that distillation does not support."""
        if self.validation.every:
            raise CascadeError(
                "validation measures the error in the noise, which objective.kind consistency does not train; leave it "
                "out."
            )
        if self.task != "lora":
            raise CascadeError("objective.kind consistency trains a LoRA; use `cascade train lora`.")
        if any(each.weight != 1 for each in self.data.sets):
            raise CascadeError(
                "objective.kind consistency weighs all pictures alike; leave weight out of data.sets."
            )
        if self.data.masked:
            raise CascadeError(
                "objective.kind consistency learns Stage C's own path at all places alike; leave masks out of data."
            )
        if self.lora.text_encoder or self.tokens:
            raise CascadeError(
                "objective.kind consistency trains Stage C alone; leave text_encoder and tokens out."
            )

    def _check_network(self) -> None:
        other = self.network if self.network != "stage_c" else None
        if other is None:
            return
        where = f"{self.task}.network is {other}"
        if self.text_with_stage_c:
            raise CascadeError(f"{where}, but text_encoder trains it beside Stage C; leave one of them out.")
        if self.objective.kind == "consistency":
            raise CascadeError(
                f"{where}, but objective.kind consistency trains Stage C alone; leave one out."
            )
        if other == "stage_b" and (self.tokens or self.models.image_encoder):
            raise CascadeError(f"{where}, which reads neither tokens nor image prompts; leave them out.")

    @property
    def network(self) -> Network:
        """The network that is trained, or that a ControlNet or tokens are trained for."""
        sections = {"lora": self.lora, "finetune": self.finetune}
        return sections[self.task].network if self.task in sections else "stage_c"

    @property
    def text_with_stage_c(self) -> bool:
        """Whether the text encoder is trained beside Stage C."""
        sections = {"lora": self.lora, "finetune": self.finetune}
        return self.task in sections and sections[self.task].text_encoder

    @property
    def text_is_trained(self) -> bool:
        """Whether captions go through the text encoder in each step."""
        return bool(self.tokens) or self.text_with_stage_c or self.network == "text_encoder"

    @property
    def deciding_models(self) -> tuple[str, ...]:
        """The keys of `models` whose files decide the result; the others only make samples."""
        if self.network == "stage_b":
            return ("stage_b", "stage_a", "text_encoder", "compressor")
        return ("stage_c", "text_encoder", "compressor", "image_encoder")

    def rate_factors(self) -> set[str]:
        """The factors of the learning rate that different parts are trained with."""
        if self.task == "finetune":
            return {"1", *({f"{self.finetune.text_learning_rate:g}"} if self.text_with_stage_c else ())}
        if self.task != "lora":
            return {"1"}
        lora = self.lora
        text = {f"{lora.text_learning_rate:g}"} if lora.text_encoder else set()
        layers = {f"{float(rate):g}" for rate in lora.rates.values()}
        ups = {f"{lora.up_learning_rate:g}"}
        return {"1", *layers, *ups, *text, *({f"{lora.token_learning_rate:g}"} if self.tokens else ())}

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))
