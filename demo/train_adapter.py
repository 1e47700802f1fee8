"""Trains one of the demo's adapters: `python -m cascade_nodes.demo.train_adapter NAME`, from the settings in `recipes`.

As `cascade train`, but on pictures drawn on the accelerator instead of those in a folder, and with a step as one CUDA
graph. A run that was stopped goes on from its last checkpoint; `--from DIR` begins with the adapter's file in that
folder instead of anew. `adapters.py` runs them all.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.adapters import Adapter, write_adapter
from cascade_nodes.cascade_core.diffusion.guidance import guide
from cascade_nodes.cascade_core.networks.precision import PRECISIONS
from cascade_nodes.cascade_core.networks.stage_c import StageC
from cascade_nodes.cascade_core.text.encoder import TextEncoder
from cascade_nodes.cascade_core.text.learned_tokens import TokenTable
from cascade_nodes.cascade_core.training.file_metadata import file_metadata
from cascade_nodes.cascade_core.training.losses import PathLevel, consistency_terms
from cascade_nodes.cascade_core.training.settings import Settings, read_settings
from cascade_nodes.cascade_core.training.settings.tasks import TaskName
from cascade_nodes.cascade_core.training.tasks.controlnet import build_controlnet, write_controlnet
from cascade_nodes.cascade_core.training.tasks.lora import begin_as, read_start
from cascade_nodes.cascade_core.training.tasks.low_rank import LowRankChanges, select_layers
from cascade_nodes.cascade_core.training.tasks.textual_inversion import LearnedTokens
from cascade_nodes.demo.adapter_data import AdapterData, source_of
from cascade_nodes.demo.clip_states import text_states
from cascade_nodes.demo.few_steps import Jumps
from cascade_nodes.demo.job import FINISHED, Draw, Job, Weights
from cascade_nodes.demo.losses import epsilon_loss
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.train import add_run_options, add_start_option, run

RECIPES = Path(__file__).parent / "recipes"
TASKS: dict[str, TaskName] = {
    "canny": "controlnet",
    "inpainting": "controlnet",
    "super_resolution": "controlnet",
    "house": "lora",
    "few_steps": "lora",
    "loop": "tokens",
}
SCENES = 60_000
CHECKPOINT_EVERY = 500  # steps
ADAPTER = "adapter"  # name of the trained network in a run


def recipe_of(name: str, device: torch.device) -> Settings:
    """An adapter's settings, those of `cascade train`."""
    settings = read_settings(RECIPES / f"{name}.yaml", TASKS[name])
    train = settings.train
    if train.precision == "auto":
        train = replace(train, precision="bf16" if device.type == "cuda" else "fp32")
    return replace(settings, train=train)


def file_to_start(job: Job, settings: Settings) -> str | None:
    """The adapter's file in the folder of weights to start from; None to start anew."""
    return None if job.start is None else str(job.start / Path(settings.output.file).name)


class Base:
    """The frozen networks that an adapter is trained for."""

    def __init__(self, job: Job, encoder: TextEncoder):
        self.encoder = encoder
        self.text_model: Any = self.encoder.model.to(job.device).requires_grad_(False)
        self.end_token = self.encoder.tokenizer.end_token
        self.stage_c: StageC = job.load("stage_c").requires_grad_(False)
        self.stage_c.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def words(self, tokens: Tensor, learned: TokenTable | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, 77) -> states (B, 77, C), pooled (B, 1, P)"""
        states, pooled = text_states(self.text_model, tokens, self.end_token, learned=learned)
        return states, pooled[:, None]

    def predict(
        self, x: Tensor, r: Tensor, words: tuple[Tensor, Tensor], control: list[Tensor | None] | None = None
    ) -> Tensor:
        """Stage C's prediction, without an image prompt."""
        no_image = x.new_zeros(len(x), 1, self.stage_c.config.c_clip_img)
        return self.stage_c(x, r, *words, no_image, control=control)


def train_adapter(name: str, job: Job, settings: Settings) -> None:
    source = source_of(name)
    encoder = job.text_encoder()
    if settings.task == "tokens":
        train_tokens(job, settings, Base(job, encoder), source)
        return
    captions = source(job, encoder.tokenizer)  # in processes, before the accelerator is used
    base = Base(job, encoder)
    data = AdapterData(job, settings, base.encoder, captions)
    trainer = train_controlnet if settings.task == "controlnet" else train_lora
    trainer(job, settings, base, data)


def train_controlnet(job: Job, settings: Settings, base: Base, data: AdapterData) -> None:
    compressor = job.load("compressor")
    torch.manual_seed(job.settings.seed)
    initial = settings.controlnet
    if (start := file_to_start(job, settings)) is not None:
        initial = replace(initial, start=start)
    controlnet = build_controlnet(initial, base.stage_c, compressor).to(job.device)
    controlnet.requires_grad_(True).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def loss(
        noised: Tensor, r: Tensor, epsilon: Tensor, weight: Tensor, tokens: Tensor, hint: Tensor, places: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        with torch.no_grad():
            words = base.words(tokens)
        hint = hint.float() / 255 if hint.dtype == torch.uint8 else hint
        predicted = base.predict(noised, r, words, controlnet(hint))
        return epsilon_loss(predicted, epsilon, weight, places)

    def write(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        write_controlnet(path, controlnet.config, state, metadata)

    _train(job, settings, controlnet, data, loss, write)


def train_lora(job: Job, settings: Settings, base: Base, data: AdapterData) -> None:
    lora = settings.lora
    layers = select_layers(base.stage_c, lora.targets)
    generator = torch.Generator().manual_seed(job.settings.seed)
    changes = LowRankChanges.of(base.stage_c, layers, lora, generator=generator).to(job.device)
    if (start := file_to_start(job, settings)) is not None:
        begin_as(read_start(start, base.stage_c), changes, None)

    def write(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        values = changes.values(state).to(PRECISIONS[lora.dtype])
        adapter = Adapter(path.name, lora.dialect, stage_c=changes.as_adapter(values))
        write_adapter(path, adapter, lora.dialect, base.stage_c, metadata=metadata)

    if settings.objective.kind == "consistency":
        loss, draw = few_steps_loss(job, settings, base, data, changes)
        _train(job, settings, changes, data, loss, write, draw)
        return

    def diffusion(
        noised: Tensor, r: Tensor, epsilon: Tensor, weight: Tensor, tokens: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            words = base.words(tokens)
        with changes.applied():
            predicted = base.predict(noised, r, words)
        return epsilon_loss(predicted, epsilon, weight)

    _train(job, settings, changes, data, diffusion, write)


def few_steps_loss(
    job: Job, settings: Settings, base: Base, data: AdapterData, changes: LowRankChanges
) -> tuple[Callable[..., dict[str, Tensor]], Draw]:
    """The loss of a distillation step, and the function that draws its inputs."""
    objective, jumps = settings.objective, Jumps(settings.objective, job.device)
    (guidance,) = objective.guidance
    empty = data.empty.to(job.device)

    def draw(step: int) -> Batch:
        tokens, (latents,) = data.take(step)
        return Batch([*jumps.draw(latents), tokens])

    def loss(x: Tensor, levels: Tensor, weight: Tensor, clean: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            words = base.words(tokens)
            without = base.words(empty[None])
            both = tuple(
                torch.cat([given, none.expand_as(given)]) for given, none in zip(words, without, strict=True)
            )

        def teacher(x: Tensor, r: Tensor) -> Tensor:
            predicted = base.predict(x.repeat(2, 1, 1, 1), r.repeat(2), (both[0], both[1]))
            with_words, without_words = predicted.chunk(2)
            return guide(with_words, without_words, guidance, objective.cfg_rescale)

        def predict(x: Tensor, r: Tensor) -> Tensor:
            with changes.applied():
                return base.predict(x, r, words)

        return consistency_terms(predict, teacher, x, [PathLevel(*level) for level in levels], weight, clean)

    return loss, draw


def train_tokens(job: Job, settings: Settings, base: Base, source: Callable[..., Any]) -> None:
    names, tokens = [token.name for token in settings.tokens], settings.tokens
    if (start := file_to_start(job, settings)) is not None:
        tokens = [replace(token, initial="", start=start) for token in tokens]
    learned = LearnedTokens(tokens, base.encoder, names).to(job.device)
    data = AdapterData(job, settings, base.encoder, source(job, base.encoder.tokenizer, learned.table().ids))

    def loss(noised: Tensor, r: Tensor, epsilon: Tensor, weight: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        words = base.words(tokens, learned.table())
        return epsilon_loss(base.predict(noised, r, words), epsilon, weight)

    def write(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        tokens = learned.tokens(state["vectors"].detach().float().cpu())
        write_adapter(path, Adapter(path.name, "comfyui", tokens=tokens), "comfyui", metadata=metadata)

    _train(job, settings, learned, data, loss, write)


def _train(
    job: Job,
    settings: Settings,
    trained: nn.Module,
    data: AdapterData,
    loss: Callable[..., dict[str, Tensor]],
    write: Callable[[dict[str, Tensor], Path, dict[str, str]], None],
    draw: Draw | None = None,
) -> None:
    def prepare() -> Draw:
        data.load()
        return draw or data.draw

    def export(weights: Weights) -> None:
        if not job.trained_steps:
            return
        metadata = file_metadata(settings, job.trained_steps, [])
        scenes = {"ss_num_train_images": f"{len(data.source.tokens)}"}
        state = {name: value.detach() for name, value in weights[ADAPTER].items()}
        write(state, job.out / Path(settings.output.file).name, metadata | scenes)

    job.train({ADAPTER: trained}, prepare, loss, export)
    if not job.trained_steps:
        (job.folder / FINISHED).unlink(missing_ok=True)
        print(f"{job.folder.name}: no time was left for a step, and nothing is written", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", choices=TASKS)
    add_run_options(parser)
    add_start_option(parser)
    parser.set_defaults(scenes=SCENES)
    options = parser.parse_args(arguments)
    settings = recipe_of(options.adapter, torch.device(options.device))

    def train(job: Job) -> None:
        job.checkpoint_every = CHECKPOINT_EVERY
        train_adapter(options.adapter, job, replace(settings, train=job.settings))

    run(options.adapter, settings.train, options, train)


if __name__ == "__main__":
    main()
