"""A whole settings file, and what its sections are to each other."""

import dataclasses
import json
from dataclasses import dataclass, field

from ...errors import CascadeError
from .data import DataSettings
from .models import ModelSettings
from .objective import ObjectiveSettings
from .output import OutputSettings, SamplePrompt
from .tasks import ControlNetSettings, FinetuneSettings, LoRASettings, TaskName, TokenSettings
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
        if self.task == "finetune" and self.train.base_weights != "full":
            raise CascadeError(
                f"train.base_weights is {self.train.base_weights}, but finetune trains those weights themselves; "
                "train a LoRA, or leave it out."
            )
        if self.train.fsdp and self.task != "finetune":
            raise CascadeError(
                f"train.fsdp divides a network that is trained itself, but {self.task} trains a few numbers beside a "
                "frozen one; leave it out."
            )
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
        """Raise CascadeError for what distillation does not have."""
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

    def rate_factors(self) -> set[str]:
        """The shares of the learning rate that parts of what is trained have."""
        if self.task != "lora":
            return {"1"}
        lora = self.lora
        text = {f"{lora.text_learning_rate:g}"} if lora.text_encoder else set()
        layers = {f"{float(rate):g}" for rate in lora.rates.values()}
        ups = {f"{lora.up_learning_rate:g}"}
        return {"1", *layers, *ups, *text, *({f"{lora.token_learning_rate:g}"} if self.tokens else ())}

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))
