"""Trains the demo cascade, one network a run: `python -m cascade_nodes.demo.train NETWORK`.

Order: stage_a, compressor (with the previewer) and clip (text and image encoder) need nothing; layout (the text encoder
alone) and vision (the image encoder alone) need clip, stage_c compressor, layout and vision, stage_b stage_a,
compressor and layout. A run that was stopped goes on from its last checkpoint. `everything.py` runs them all.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core.geometry import stage_b_size, stage_c_size
from cascade_nodes.cascade_core.networks.compressor import SemanticCompressor
from cascade_nodes.cascade_core.networks.previewer import Previewer
from cascade_nodes.cascade_core.networks.stage_a import StageA
from cascade_nodes.cascade_core.networks.stage_b import StageB
from cascade_nodes.cascade_core.networks.stage_c import StageC
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.cascade_core.training.log import LOG
from cascade_nodes.cascade_core.training.settings import TrainSettings
from cascade_nodes.demo import recipe
from cascade_nodes.demo.clip_states import encoder_layer, text_states
from cascade_nodes.demo.dataset import as_float, for_compressor, resized
from cascade_nodes.demo.detail import DetailDecoder
from cascade_nodes.demo.drawing import OTHER_FRAMES, mixed_pictures, other_frame
from cascade_nodes.demo.initialise import initialise_stage_a, initialise_unet
from cascade_nodes.demo.job import FINISHED, Draw, Job, Weights, own_tokenizer
from cascade_nodes.demo.losses import epsilon_loss, outline_weights, stage_a_loss, weighted_mse
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.stage_b_data import StageBData
from cascade_nodes.demo.stage_c_data import StageCData
from cascade_nodes.demo.train_encoders import (
    RELATIONS,
    export_text_encoder,
    text_config,
    train_clip,
    train_layout,
    train_vision,
)

ENOUGH_RELATIONS = 0.9
DECODERS_ALONE = 200  # first steps of a compressor with given weights, in which its decoders alone learn
WEIGHTS = Path(__file__).parent / "weights"


def train_stage_a(job: Job) -> None:
    pool = job.pool(
        lambda number, count: [mixed_pictures(job, count, number)], 0.15, first=0.4, every=200, endless=True
    )
    model = initialise_stage_a(StageA.from_config(recipe.STAGE_A)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # Fixed at 0.43, so that in the published units (÷ 0.43) every channel has a standard deviation of 1.
    norm = model.down_blocks[-1].get_submodule("1")  # the last BatchNorm
    nn.init.constant_(norm.requires_grad_(False).get_parameter("weight"), recipe.STAGE_A["scale_factor"])
    job.compile(model)

    def draw(step: int) -> Batch:
        pool.advance(step)
        images = pool.take(job.settings.batch_size)[0]
        shape = len(images), recipe.STAGE_A["c_latent"], *stage_b_size(*images.shape[-2:])
        return Batch([images, recipe.STAGE_A_NOISE * torch.randn(shape, device=job.device)])

    def loss(images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return stage_a_loss(model, as_float(images), noise)

    def export(weights: Weights) -> None:
        job.export("demo_stage_a.safetensors", "stage_a", weights["stage_a"], recipe.STAGE_A)

    job.train({"stage_a": model}, lambda: draw, loss, export)


def train_compressor(job: Job) -> None:
    """The compressor with two decoders of its (noisy) latent: the previewer, and one for detail that is discarded."""
    pool = job.pool(
        lambda number, count: [mixed_pictures(job, count, number)], 0.3, first=0.4, every=150, endless=True
    )
    others = {
        frame: job.pool(
            lambda number, count, frame=frame: [mixed_pictures(job, count, number, frame, frame=frame)],
            0.03, first=1,
        )
        for frame in OTHER_FRAMES
    }  # fmt: skip
    networks: dict[str, nn.Module] = {
        "compressor": SemanticCompressor.from_config(recipe.COMPRESSOR),
        "previewer": Previewer.from_config(recipe.PREVIEWER),
        "detail": DetailDecoder(recipe.LATENT[0]),
    }
    networks = {
        name: n.to(device=job.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for name, n in networks.items()
    }
    # Not compiled, which would take longer than it saves here.
    compressor, previewer, detail = networks.values()

    def draw(step: int) -> Batch:
        frame = other_frame(job, step, recipe.OTHER_FRAMES_SHARE)
        chosen = pool if frame is None else others[frame]
        chosen.advance(step)
        images = chosen.take(job.settings.batch_size)[0]
        size = stage_c_size(*images.shape[-2:])
        noise = torch.randn(len(images), recipe.LATENT[0], *size, device=job.device)
        # A trained compressor waits for the decoder for detail, which begins with random weights.
        learns = torch.full((), float(job.start is None or step >= DECODERS_ALONE), device=job.device)
        return Batch([images, recipe.COMPRESSOR_NOISE * noise, learns], rare=frame is not None)

    def loss(batch: Tensor, noise: Tensor, learns: Tensor) -> dict[str, Tensor]:
        images = as_float(batch)
        latent = compressor(for_compressor(batch)).float()  # (B, 16, 6, 6)
        # Noise makes similar latents mean similar pictures, so that Stage C need not be exact.
        latent = latent.detach().lerp(latent, learns) + noise
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=job.device)
        for name, decoded, share in (("preview", previewer(latent), 1.0), ("detail", detail(latent), 2.0)):
            target = resized(images, decoded.shape[-2:])
            weight = outline_weights(images, decoded.shape[-2:])
            error = weighted_mse(decoded, target, weight)
            absolute = ((decoded.float() - target).abs() * weight).mean()
            total = total + share * error + 0.1 * absolute
            terms[name] = (decoded.float() - target).square().mean()
        return {"loss": total, **terms}

    def export(weights: Weights) -> None:
        job.export("demo_compressor.safetensors", "compressor", weights["compressor"], recipe.COMPRESSOR)
        job.export("demo_previewer.safetensors", "previewer", weights["previewer"], recipe.PREVIEWER)

    job.train(networks, lambda: draw, loss, export)


def train_stage_c(job: Job) -> None:
    """Stage C and the text encoder together, since the contrastive loss alone trains only the pooled state."""
    tokenizer = own_tokenizer()
    data = StageCData(job, tokenizer)
    text_model = build_text_model(text_config(tokenizer)).to(job.device)
    model = initialise_unet(StageC.from_config(recipe.STAGE_C)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network, layer = job.compile(model), job.compile_function(encoder_layer)

    def prepare() -> Draw:
        tell_relations(job)
        text_model.load_state_dict(job.text_encoder().model.state_dict())
        data.load()
        return data.draw

    def loss(
        noised: Tensor,
        r: Tensor,
        epsilon: Tensor,
        weight: Tensor,
        tokens: Tensor,
        images: Tensor,
        places: Tensor,
    ) -> dict[str, Tensor]:
        states, pooled = text_states(text_model, tokens, tokenizer.end_token, layer)
        return epsilon_loss(network(noised, r, states, pooled[:, None], images), epsilon, weight, places)

    def export(weights: Weights) -> None:
        job.export("demo_stage_c.safetensors", "stage_c", weights["stage_c"], recipe.STAGE_C)
        export_text_encoder(job, weights)

    job.train(
        {"stage_c": model, "text": text_model}, prepare, loss, export, {"text": 0.5},
        data.rehearsals(), needed=2, inputs=("compressor", "layout", "vision"),
    )  # fmt: skip


def tell_relations(job: Job) -> None:
    """Warns if the text encoder has not learned relations: a bag of words stays one, whatever Stage C's loss."""
    path = job.folder.parent / "layout" / LOG
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    right = json.loads(rows[-1]).get(RELATIONS, 1.0) if rows else 1.0
    if right < ENOUGH_RELATIONS:
        print(
            f"stage_c: layout tells only {right:.0%} of the relations from their opposites, and pictures will show "
            "them by chance; train it for longer",
            flush=True,
        )


def train_stage_b(job: Job) -> None:
    """Stage B on Stage A's latents, conditioned on the compressor's, which are sometimes noisy or absent.

    The latent has all information of the pooled text, so the text is often left out or replaced by another's: Stage B
    must not rely on it.
    """
    data = StageBData(job)
    model = initialise_unet(StageB.from_config(recipe.STAGE_B)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network = job.compile(model)

    def prepare() -> Draw:
        data.load()
        return data.draw

    def loss(
        noised: Tensor,
        r: Tensor,
        epsilon: Tensor,
        weight: Tensor,
        effnet: Tensor,
        clip: Tensor,
        places: Tensor,
    ) -> dict[str, Tensor]:
        return epsilon_loss(network(noised, r, effnet, clip), epsilon, weight, places)

    def export(weights: Weights) -> None:
        job.export("demo_stage_b.safetensors", "stage_b", weights["stage_b"], recipe.STAGE_B)

    job.train(
        {"stage_b": model}, prepare, loss, export, rehearsals=data.rehearsals(),
        inputs=("stage_a", "compressor", "layout"),
    )  # fmt: skip


STAGES: dict[str, Callable[[Job], None]] = {
    "stage_a": train_stage_a,
    "compressor": train_compressor,
    "clip": train_clip,
    "layout": train_layout,
    "vision": train_vision,
    "stage_b": train_stage_b,
    "stage_c": train_stage_c,
}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options common to all runs."""
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="checkpoints and logs (default: runs)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="networks trained before")
    parser.add_argument("--out", type=Path, help="where the result goes (default: --weights)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=recipe.TRAIN_SCENES)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--minutes", type=float, help="stop and write a checkpoint after so long")
    parser.add_argument("--fit", type=float, help="train for so many minutes instead of a number of steps")
    parser.add_argument(
        "--until", type=float, help="train until then (seconds since 1970) instead of a number of steps"
    )
    parser.add_argument("--learning-rate", type=float, help="default: the recipe's")
    parser.add_argument("--no-compile", action="store_true", help="compile no blocks")
    parser.add_argument("--no-graphs", action="store_true", help="capture no CUDA graphs")


def add_start_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="start", type=Path, help="begin with the weights of this folder, where they fit"
    )


def run(
    name: str, settings: TrainSettings, options: argparse.Namespace, train: Callable[[Job], None]
) -> None:
    """Train with the settings as changed by the options, unless the run is finished."""
    changes = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    settings = replace(settings, **{k: v for k, v in changes.items() if v is not None})
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        fast_kernels()
    job = Job(
        settings, options.work / name, options.weights, options.out or options.weights, device, options.scenes,
        options.minutes, options.fit, options.until, cuda and not options.no_compile,
        cuda and not options.no_graphs, getattr(options, "wait", False), getattr(options, "start", None),
    )  # fmt: skip
    if options.steps is None and (job.folder / FINISHED).exists():
        print(f"{name}: trained already, as {job.folder / FINISHED} says", flush=True)
        return
    started = time.monotonic()
    train(job)
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=STAGES)
    add_run_options(parser)
    add_start_option(parser)
    parser.add_argument(
        "--wait", action="store_true", help="for the networks that it needs, which are trained beside it"
    )
    options = parser.parse_args(arguments)
    run(options.network, recipe.SETTINGS[options.network], options, STAGES[options.network])


def fast_kernels() -> None:
    """Enables TF32, and eager execution of blocks that fail to compile."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64  # kinds of blocks, times widths and sizes
    torch._dynamo.config.suppress_errors = True


if __name__ == "__main__":
    main()
