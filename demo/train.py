"""Trains the demo cascade, one network a run: `python -m cascade_nodes.demo.train NETWORK`.

Order: stage_a, compressor (with the previewer) and clip (text and image encoder) need nothing; stage_c needs the last
two, stage_b all three. A run that was stopped goes on from its last checkpoint.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.cascade_core.networks.compressor import SemanticCompressor
from cascade_nodes.cascade_core.networks.previewer import Previewer
from cascade_nodes.cascade_core.networks.stage_a import StageA
from cascade_nodes.cascade_core.networks.stage_b import StageB
from cascade_nodes.cascade_core.networks.stage_c import StageC
from cascade_nodes.cascade_core.text.encoder import TextEncoder, build_text_model, encode_tokens
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.vision import CLIP_MEAN, CLIP_STD, ImageEncoder, build_vision_model
from cascade_nodes.demo import recipe
from cascade_nodes.demo.captions import vocabulary
from cascade_nodes.demo.dataset import as_float, captions, contrasts, for_compressor, pictures, resized
from cascade_nodes.demo.detail import DetailDecoder
from cascade_nodes.demo.initialise import initialise_stage_a, initialise_unet
from cascade_nodes.demo.job import PART, Job, export_text_encoder, in_parts, semantic_latents
from cascade_nodes.demo.losses import contrastive_loss, stage_a_loss

WEIGHTS = Path(__file__).parent / "weights"


def train_stage_a(job: Job) -> None:
    images = pictures(job.train_scenes(0.1), job.device)
    model = initialise_stage_a(StageA.from_config(recipe.STAGE_A)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    # Held at 0.43, so that in the published units (÷ 0.43) every channel has a standard deviation of one.
    norm = model.down_blocks[-1].get_submodule("1")  # the last BatchNorm
    nn.init.constant_(norm.requires_grad_(False).get_parameter("weight"), recipe.STAGE_A["scale_factor"])
    job.compile(model)
    average = job.train(
        {"stage_a": model}, lambda rows: stage_a_loss(model, as_float(images[rows])), len(images)
    )
    job.export("demo_stage_a.safetensors", "stage_a", average["stage_a"], recipe.STAGE_A)


def train_compressor(job: Job) -> None:
    """The compressor with two decoders of its (noisy) latent: the previewer, and one for detail that is thrown away."""
    images = pictures(job.train_scenes(0.3), job.device)
    networks = {
        "compressor": SemanticCompressor.from_config(recipe.COMPRESSOR),
        "previewer": Previewer.from_config(recipe.PREVIEWER),
        "detail": DetailDecoder(recipe.LATENT[0]),
    }
    networks = {
        name: n.to(device=job.device, memory_format=torch.channels_last) for name, n in networks.items()
    }
    compressor, previewer, detail = (job.compile(network) for network in networks.values())

    def loss(rows: Tensor) -> dict[str, Tensor]:
        batch = images[rows]
        latent = compressor(for_compressor(batch))  # (B, 16, 6, 6)
        # Noise makes near latents mean near pictures, which Stage C can then hit.
        latent = latent + 0.15 * torch.randn_like(latent)
        preview, large = previewer(latent).float(), detail(latent).float()
        preview_target, target = (
            resized(as_float(batch), preview.shape[-1]),
            resized(as_float(batch), large.shape[-1]),
        )
        preview_loss = F.mse_loss(preview, preview_target)
        detail_loss = F.mse_loss(large, target)
        absolute = F.l1_loss(large, target) + F.l1_loss(preview, preview_target)
        return {
            "loss": preview_loss + 2 * detail_loss + 0.1 * absolute,
            "preview": preview_loss,
            "detail": detail_loss,
        }

    average = job.train(networks, loss, len(images))
    job.export("demo_compressor.safetensors", "compressor", average["compressor"], recipe.COMPRESSOR)
    job.export("demo_previewer.safetensors", "previewer", average["previewer"], recipe.PREVIEWER)


def train_clip(job: Job) -> None:
    """Text and image encoder, told apart by captions that are wrong in one thing."""
    tokenizer = Tokenizer.from_vocabulary(*build_small_vocabulary(vocabulary() | {","}))
    text_config, vision_config = {**recipe.TEXT, "vocab_size": len(tokenizer)}, recipe.VISION
    scenes = job.train_scenes()
    images = pictures(scenes, job.device, smaller=vision_config["image_size"])
    texts = contrasts(scenes, recipe.WRONG_CAPTIONS_PER_SCENE, tokenizer, job.settings.seed).to(job.device)
    longest = int((texts != tokenizer.end_token).sum(-1).max()) + 1  # nothing sees past the end token
    texts = texts[..., :longest].contiguous()
    mean, std = (torch.tensor(v, device=job.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    networks = {
        "text": build_text_model(text_config).to(job.device),
        "image": build_vision_model(vision_config).to(job.device),
        "scale": nn.ParameterList([torch.tensor(2.0, device=job.device)]),
    }
    text_model, image_model, scale = networks.values()

    def loss(rows: Tensor) -> dict[str, Tensor]:
        image = image_model(pixel_values=(as_float(images[rows]) - mean) / std).image_embeds  # (B, E)
        tokens = texts[rows].long()  # (B, 1 + N, T)
        pooled = encode_tokens(text_model, tokens.flatten(0, 1), tokenizer.end_token).pooled
        pooled = pooled.unflatten(0, tokens.shape[:2])  # (B, 1 + N, E)
        return contrastive_loss(image, pooled[:, 0], pooled[:, 1:], scale[0])

    average = job.train(networks, loss, len(images))
    job.export("demo_image_encoder.safetensors", "image_encoder", average["image"], vision_config)
    export_text_encoder(job, average["text"], text_config, tokenizer)


def train_stage_c(job: Job) -> None:
    """Stage C, and the text encoder with it: contrast alone leaves most of the states untaught."""
    encoder = TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32)
    text_model, tokenizer = encoder.model.to(job.device).requires_grad_(True), encoder.tokenizer
    vision = ImageEncoder.load(job.weights / "demo_image_encoder.safetensors", dtype=torch.float32)
    vision.model.to(job.device)
    scenes = job.train_scenes()
    latents = semantic_latents(job, scenes)
    size = recipe.VISION["image_size"]
    parts = range(0, len(scenes), PART)
    images = torch.cat(
        [
            in_parts(
                lambda p: vision.encode(as_float(p).movedim(1, -1)),
                pictures(scenes[i : i + PART], job.device, smaller=size),
            )
            for i in parts
        ]
    )  # (N, E)
    texts = captions(scenes, recipe.CAPTIONS_PER_SCENE, tokenizer, job.settings.seed).to(job.device)
    empty = torch.tensor([token for token, _ in tokenizer.empty_chunk()], device=job.device)
    model = initialise_unet(StageC.from_config(recipe.STAGE_C)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network = job.compile(model)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        chance = torch.rand(3, len(rows), device=job.device)
        with_image = chance[0] < 0.3
        without_text = torch.where(with_image, chance[1] < 0.5, chance[1] < 0.1)
        pick = (chance[2] * texts.shape[1]).long()
        tokens = torch.where(without_text[:, None], empty, texts[rows, pick].long())
        states, pooled = encode_tokens(text_model, tokens, tokenizer.end_token)
        image = images[rows] * with_image[:, None]

        def predict(noised: Tensor, r: Tensor) -> Tensor:
            return network(noised, r, states, pooled[:, None], image[:, None])

        return diffusion_loss(predict, latents[rows])

    average = job.train({"stage_c": model, "text": text_model}, loss, len(latents), {"text": 0.5})
    job.export("demo_stage_c.safetensors", "stage_c", average["stage_c"], recipe.STAGE_C)
    export_text_encoder(job, average["text"], {**recipe.TEXT, "vocab_size": len(tokenizer)}, tokenizer)


def train_stage_b(job: Job) -> None:
    """Stage B on Stage A's latents, from the compressor's, sometimes noisy or absent.

    The latent says all that the pooled text does, so the text is often left out or another's: Stage B must not lean
    on it.
    """
    encoder = TextEncoder.load(job.weights / "demo_text_encoder", dtype=torch.float32)
    encoder.model.to(job.device).requires_grad_(False)
    stage_a = job.load("stage_a")
    compressor = job.load("compressor")
    scenes = job.train_scenes(0.6)
    latents, conditions = [], []
    for start in range(0, len(scenes), PART):
        images = pictures(scenes[start : start + PART], job.device)
        latents.append(in_parts(lambda p: stage_a.encode(as_float(p)).half(), images, 256))
        conditions.append(in_parts(lambda p: compressor(for_compressor(p)), images, 1024))
    latents, conditions = torch.cat(latents), torch.cat(conditions)  # (N, 4, 64, 64), (N, 16, 6, 6)
    texts = captions(scenes, 1, encoder.tokenizer, job.settings.seed)[:, 0].to(job.device)
    end = encoder.tokenizer.end_token
    pooled = in_parts(lambda p: encode_tokens(encoder.model, p.long(), end).pooled, texts)  # (N, P)
    model = initialise_unet(StageB.from_config(recipe.STAGE_B)).to(job.device)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network = job.compile(model)

    def loss(rows: Tensor) -> dict[str, Tensor]:
        chance = torch.rand(3, len(rows), 1, device=job.device)
        clip = pooled[torch.where(chance[0, :, 0] < 0.25, rows.roll(1), rows)] * (chance[1] < 0.5)
        effnet = conditions[rows]
        strength = 0.25 * torch.rand(len(rows), 1, 1, 1, device=job.device)
        effnet = effnet + strength * torch.randn_like(effnet)
        effnet = effnet * (chance[2] >= 0.05)[..., None, None]
        return diffusion_loss(
            lambda noised, r: network(noised, r, effnet, clip[:, None]), latents[rows].float()
        )

    average = job.train({"stage_b": model}, loss, len(latents))
    job.export("demo_stage_b.safetensors", "stage_b", average["stage_b"], recipe.STAGE_B)


STAGES = {
    "stage_a": train_stage_a,
    "compressor": train_compressor,
    "clip": train_clip,
    "stage_b": train_stage_b,
    "stage_c": train_stage_c,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=STAGES)
    parser.add_argument(
        "--work", type=Path, default=Path("runs"), help="checkpoints and logs (default: runs)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="networks trained before")
    parser.add_argument("--out", type=Path, help="where the trained network goes (default: --weights)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=recipe.TRAIN_SCENES)
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--minutes", type=float, help="stop and write a checkpoint after so long")
    parser.add_argument(
        "--fit", type=float, help="choose the number of steps so that it takes so many minutes"
    )
    parser.add_argument("--learning-rate", type=float, help="default: the recipe's")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    changes = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    settings = replace(
        recipe.SETTINGS[options.network], **{k: v for k, v in changes.items() if v is not None}
    )
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    compiled = device.type == "cuda" and not options.no_compile
    job = Job(
        settings, options.work / options.network, options.weights, options.out or options.weights, device,
        options.scenes, options.minutes, options.fit, compiled,
    )  # fmt: skip
    started = time.monotonic()
    STAGES[options.network](job)
    print(f"{options.network}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
