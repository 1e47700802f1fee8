"""What ComfyUI does with the values of our loaders: clones, offloading, precision, LoRA, its VAE and CLIP nodes."""

import tempfile
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.sd
import native
import torch
from comfy_extras import nodes_stable_cascade
from comparing import relative
from interop import encode, make_run, only

import nodes
from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes import latents
from cascade_nodes.nodes.hosts import comfyui, headless
from cascade_nodes.nodes.hosts.comfyui.sampling import with_shift

LAYER = "down_blocks.0.2.attention.attn.to_q"
RANK, ALPHA, STRENGTH = 4, 2.0, 0.75


def lora_file(folder: Path, module: str, width: int) -> tuple[Path, torch.Tensor]:
    """A kohya LoRA of one layer, and the change that it stands for at full strength."""
    down, up = torch.randn(RANK, width), torch.randn(width, RANK) * 0.1
    path = folder / f"{module}.safetensors"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    checkpoints.write_safetensors(path, {f"{module}.{name}": t for name, t in tensors.items()}, {})
    return path, ALPHA / RANK * up @ down


def with_lora(path: Path, model: Any, clip: Any) -> tuple[Any, Any]:
    return comfy.sd.load_lora_for_models(
        model, clip, checkpoints.read_safetensors(path)[0], STRENGTH, STRENGTH
    )


def stage_c_lora(folder: Path, prompts: Any) -> dict[str, float]:
    """ComfyUI's LoRA on our MODEL against the same change written into the file."""
    tensors, metadata = checkpoints.read_safetensors(WEIGHTS / "demo_stage_c.safetensors")
    name = next(key for key in tensors if key.endswith("attn.to_q.weight"))
    module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    path, change = lora_file(folder, module, tensors[name].shape[0])
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    plain_file, merged_file = folder / "plain.safetensors", folder / "merged.safetensors"
    checkpoints.write_safetensors(plain_file, tensors, metadata)
    checkpoints.write_safetensors(merged_file, tensors | {name: tensors[name] + STRENGTH * change}, metadata)
    model = comfyui.load_network("stage_c", plain_file, "fp32")

    def sampled(of: Any) -> torch.Tensor:
        return comfyui.sample(make_run("stage_c", of, prompts, steps=4)).latent

    before = sampled(model)
    patched = sampled(with_lora(path, model, None)[0])
    merged = sampled(comfyui.load_network("stage_c", merged_file, "fp32"))
    return {
        "LoRA against merged weights": relative(patched, merged),
        "LoRA's own effect": relative(patched, before),
        "after the LoRA": relative(sampled(model), before),
    }


def clip_lora(folder: Path, clip: Any) -> dict[str, float]:
    """ComfyUI's LoRA on our CLIP: the weight of one layer is changed by what the file says."""
    weights = clip.cond_stage_model.state_dict()
    name = next(key for key in weights if key.endswith("layers.0.self_attn.q_proj.weight"))
    path, change = lora_file(
        folder, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", len(weights[name])
    )
    before = encode("native", clip)[0][0][0]
    patched = with_lora(path, None, clip)[1]
    after = encode("native", patched)[0][0][0]
    weights[name].add_(STRENGTH * change)  # by hand
    merged = encode("native", clip)[0][0][0]
    weights[name].sub_(STRENGTH * change)
    return {
        "CLIP LoRA against merged": relative(after, merged),
        "CLIP LoRA's effect": relative(after, before),
    }


def schedule_of_its_own() -> dict[str, float]:
    """The model's own schedule after one of another shift was in its place.

    As where weights are paged: a model's buffers are kept by name, and set again once another patch is there.
    """
    model = comfyui.load_network("stage_c", WEIGHTS / "demo_stage_c.safetensors", "fp32")
    schedule = model.get_model_object("model_sampling")
    sigmas = schedule.sigmas.clone()
    stable_cascade = comfy.model_base.ModelType.STABLE_CASCADE
    host_schedule = comfy.model_base.model_sampling(model.model.model_config, stable_cascade)
    other_schedule = with_shift(model, schedule.shift + 2).get_model_object("model_sampling")
    shifted = other_schedule.sigmas.clone()
    for before, after in ((schedule, other_schedule), (other_schedule, schedule)):
        model.model.model_sampling = before
        buffers = dict(model.model.named_buffers())
        model.model.model_sampling = after
        for name, buffer in buffers.items():
            module_name, _, attribute = name.rpartition(".")
            model.model.get_submodule(module_name).register_buffer(attribute, buffer)
    return {
        "the model's own sigmas": relative(sigmas, host_schedule.sigmas),
        "the model's own logarithms of sigmas": relative(schedule.log_sigmas, host_schedule.log_sigmas),
        "the model's own schedule, after another": relative(schedule.sigmas, sigmas),
        "the other schedule, after the model's own": relative(other_schedule.sigmas, shifted),
        "the other schedule's effect": relative(other_schedule.sigmas, schedule.sigmas),
    }


def precision_and_placement(prompts: Any) -> dict[str, float]:
    """A clone and a partly loaded MODEL against float32 as loaded; other weights against float32 in plain PyTorch,
    as the engine leaves to it what is cast as it is used."""
    path = WEIGHTS / "demo_stage_c.safetensors"
    models = {
        dtype: comfyui.load_network("stage_c", path, dtype) for dtype in ("fp32", "bf16", "fp16", "fp8")
    }

    def predicted(of: Any, engine: bool = True) -> torch.Tensor:
        return comfyui.sample(make_run("stage_c", of, prompts, steps=4, denoise=0.5, engine=engine)).latent

    reference, plain = predicted(models["fp32"]), predicted(models["fp32"], engine=False)
    results = {
        f"{dtype} weights": relative(predicted(models[dtype]), plain) for dtype in ("bf16", "fp16", "fp8")
    }
    results["the engine"] = relative(reference, plain)
    stored = {
        p.dtype
        for name, p in models["fp8"].model.diffusion_model.state_dict().items()
        if "to_q.weight" in name
    }
    assert stored == {torch.float8_e4m3fn}, stored
    results["a clone"] = relative(predicted(models["fp32"].clone()), reference)
    whole = models["fp32"].model_size()
    models["fp32"].unpatch_model(torch.device("cpu"))
    loaded = models["fp32"].partially_load(torch.device("cpu"), whole // 2)
    results["partly loaded, share"] = float(loaded or models["fp32"].loaded_size()) / whole
    results["partly loaded"] = relative(predicted(models["fp32"]), reference)
    return results


def native_vae_nodes() -> dict[str, float]:
    """ComfyUI's VAE nodes on our VAEs, and what ComfyUI reads of a VAE, against a native one."""
    ours, theirs = comfyui.load_stage_a(WEIGHTS / "demo_stage_a.safetensors"), native.vae()
    latent, image = {"samples": torch.randn(1, 4, 64, 64) * 0.4}, torch.rand(1, 256, 256, 3)
    whole = only(nodes.VAEDecode().decode(ours, latent))
    tiled, theirs_tiled = (
        only(nodes.VAEDecodeTiled().decode(vae, latent, 128, 32)).clamp(0, 1) for vae in (ours, theirs)
    )
    encoded = [only(nodes.VAEEncode().encode(vae, image))["samples"] for vae in (ours, theirs)]
    for name in ("downscale_ratio", "upscale_ratio", "latent_channels", "latent_dim", "output_channels",
                 "working_dtypes", "not_video", "crop_input", "disable_offload"):  # fmt: skip
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    coder = comfyui.load_compressor(
        WEIGHTS / "demo_compressor.safetensors", WEIGHTS / "demo_previewer.safetensors"
    )
    encode_node = nodes_stable_cascade.StableCascade_StageC_VAEEncode
    stage_c = only(encode_node.execute(image, coder, 42))["samples"]
    assert stage_c.shape == (1, 16, 6, 6), stage_c.shape
    preview = only(nodes.VAEDecode().decode(coder, {"samples": stage_c}))
    assert preview.shape == (1, 48, 48, 3), preview.shape
    large = {"samples": torch.randn(1, 16, 24, 24)}
    views = [
        only(nodes.VAEDecode().decode(coder, large)),
        only(nodes.VAEDecodeTiled().decode(coder, large, 128, 64)),
    ]
    by_node = only(nodes.VAEEncode().encode(coder, image))["samples"]
    by_ours = only(latents.CascadeEncode.execute(coder, image, 32.0))["samples"]
    return {
        "VAEDecode, native network": relative(
            whole, only(nodes.VAEDecode().decode(theirs, latent)).clamp(0, 1)
        ),
        "VAEEncode, native network": relative(encoded[0], encoded[1]),
        "VAEDecodeTiled, native network": relative(tiled, theirs_tiled),
        "VAEDecodeTiled against VAEDecode, mean": (tiled - whole).abs().mean().item(),
        "VAEDecodeTiled of Stage C, mean": (views[1] - views[0]).abs().mean().item(),
        "VAEEncode with the compressor": relative(by_node, by_ours),
    }


def vision(clip: Any) -> dict[str, float]:
    """CLIPVisionEncode and unCLIPConditioning with our CLIP_VISION, against CascadeImagePrompt."""
    from cascade_nodes.nodes.conditioning import CascadeImagePrompt

    ours = comfyui.load_vision(WEIGHTS / "demo_image_encoder.safetensors")
    image = torch.rand(1, 256, 256, 3)
    encoded = only(nodes.CLIPVisionEncode().encode(ours, image, "center"))
    positive, negative = encode("ours", clip)
    prompt = only(nodes.unCLIPConditioning().apply_adm(positive, encoded, 0.8, 0.0))
    our_prompt = only(CascadeImagePrompt.execute(positive, ours, image, 0.8))
    model = comfyui.load_network("stage_c", WEIGHTS / "demo_stage_c.safetensors", "fp32")
    with_native, with_ours, without = (
        comfyui.sample(make_run("stage_c", model, (one, negative), steps=4)).latent
        for one in (prompt, our_prompt, positive)
    )
    oblong = torch.rand(1, 300, 400, 3, generator=torch.Generator().manual_seed(3))
    headless_vision = headless.load_vision(WEIGHTS / "demo_image_encoder.safetensors")
    embeds = (
        comfyui.encode_image(ours, oblong).image_embeds,
        headless.encode_image(headless_vision, oblong).image_embeds,
    )
    return {
        "unCLIPConditioning against CascadeImagePrompt": relative(with_native, with_ours),
        "the image's own effect": relative(with_ours, without),
        "an oblong image with and without ComfyUI": relative(*embeds),
    }


def measure() -> dict[str, float]:
    clip = comfyui.load_text_encoder(WEIGHTS / "demo_text_encoder")
    prompts = encode("ours", clip)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            **stage_c_lora(folder, prompts),
            **clip_lora(folder, clip),
            **precision_and_placement(prompts),
            **schedule_of_its_own(),
            **native_vae_nodes(),
            **vision(clip),
        }
