"""The training loop: AdamW, warm-up and cosine decay, bfloat16, weight averaging, checkpoint and resume.

Everything random in a step follows from (seed, step) alone, so that a run that was killed and resumed from its last
checkpoint gives the same weights, bit for bit, as one that was not.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.files import read_safetensors, write_safetensors
from ..errors import CascadeError
from .ema import ema_decay, update_ema


@dataclass(frozen=True)
class Settings:
    """What a run needs besides its networks and its loss. `learning_rate` is the peak; betas and eps are AdamW's."""

    steps: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.01
    warmup: int = 200
    final_learning_rate: float = 0.02  # as a share of the peak
    betas: tuple[float, float] = (0.9, 0.99)
    gradient_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0
    bf16: bool = True
    log_every: int = 50
    checkpoint_every: int = 1000


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to `final_learning_rate` of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """Trains `networks` with a loss given as a function of the step.

    networks: what is trained, by name; `average` holds their moving averages, which are what a run is for.
    folder: where `state.safetensors` (for resuming) and `log.jsonl` go.
    groups: learning-rate factors by network name, 1 where absent.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        settings: Settings,
        folder: Path,
        groups: dict[str, float] | None = None,
    ):
        self.networks = nn.ModuleDict(networks)
        self.average = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.settings = settings
        self.folder = Path(folder)
        self.step = 0
        self.device = next(self.networks.parameters()).device
        self.factors = [(groups or {}).get(name, 1.0) for name in networks]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in network.parameters() if p.requires_grad]}
                for network in networks.values()
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=self.device.type == "cuda",
        )

    def run(
        self, loss: Callable[[int], dict[str, Tensor]], until: int | None = None, minutes: float | None = None
    ) -> None:
        """Trains to step `until` (default: all) or for `minutes`, then writes a checkpoint.

        loss(step) returns its terms by name: `loss` is minimised, the others are logged.
        """
        started, last_step = time.monotonic(), until or self.settings.steps
        window: dict[str, Tensor] = {}
        self.networks.train()
        while self.step < last_step:
            if minutes is not None and time.monotonic() - started > minutes * 60:
                break
            terms = self._update(loss)
            for name, value in terms.items():
                window[name] = window.get(name, torch.zeros((), device=self.device)) + value
            if self.step % self.settings.log_every == 0:
                self._log(
                    {name: (value / self.settings.log_every).item() for name, value in window.items()},
                    started,
                )
                window = {}
            if self.step % self.settings.checkpoint_every == 0:
                self.save()
        self.save()

    def _update(self, loss: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        rate = learning_rate(self.step, self.settings)
        for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            terms = loss(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), self.settings.gradient_norm)
        self.optimiser.step()
        update_ema(self.average, self.networks, ema_decay(self.step, self.settings.ema))
        self.step += 1
        return {name: value.detach() for name, value in terms.items()}

    def _log(self, terms: dict[str, float], started: float) -> None:
        if not math.isfinite(terms["loss"]):
            raise CascadeError(
                f"The loss is {terms['loss']} at step {self.step}; lower the learning rate and resume."
            )
        row = {"step": self.step, "seconds": round(time.monotonic() - started, 1), **terms}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.folder.name} {self.step}/{self.settings.steps} {row['seconds']} s ", end="")
        print(" ".join(f"{name} {value:.4g}" for name, value in terms.items()), flush=True)

    def save(self) -> None:
        """Writes everything that resuming needs, whole or not at all."""
        tensors = {f"network.{name}": value for name, value in self.networks.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
        write_safetensors(self.folder / "state.safetensors", tensors, {"step": str(self.step)})

    def resume(self) -> bool:
        """Continues from the folder's checkpoint where there is one; says whether there was."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        tensors, metadata = read_safetensors(path)
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimiser": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.networks.load_state_dict(parts["network"])
        self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            index, _, field = name.partition(".")
            state.setdefault(int(index), {})[field] = value.clone()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step = int(metadata["step"])
        return True
