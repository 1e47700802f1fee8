"""LoRAs and learned tokens: our node against ComfyUI's own loader, its embeddings, and the host without ComfyUI."""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.lora
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import native
import torch
from comparing import randomise, relative
from interop import make_run, only
from torch import Tensor

import nodes
from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank, read_adapter, write_adapter
from cascade_nodes.cascade_core.adapters.changes import Change, Difference, Hadamard, Kronecker
from cascade_nodes.cascade_core.adapters.rotations import RowRotation
from cascade_nodes.cascade_core.adapters.tokens import NewToken
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.training.settings import LoRASettings, ObjectiveSettings
from cascade_nodes.cascade_core.training.tasks.lora import LoRATask
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.nodes import conditioning, loaders
from cascade_nodes.nodes.hosts import comfyui, headless
from cascade_nodes.nodes.lora import CascadeLoRAApply

RANK, STEPS = 4, 3
PROMPT = "a large red star"
TOKEN_PROMPTS = (
    "a [sun] on sand",
    "[SUN], ([sun]:1.4) a (red [sun] star:0.7)",
    "star " * 73 + "[sun] ring",  # moves on whole
    "ring " * 70 + "[sun][sun][sun] star",
)


def change(shape: tuple[int, ...], magnitude: str | None, size: float) -> LowRank:
    """A random change for a weight of that shape; magnitude: "row", "column" or None."""
    ends = (1,) * (len(shape) - 2)
    down, up = torch.randn(RANK, *shape[1:]) * size, torch.randn(shape[0], RANK, *ends)
    sizes = {"row": (shape[0], 1), "column": (1, shape[1])}
    norms = None if magnitude is None else torch.rand(sizes[magnitude]) + 0.5
    return LowRank(down, up, 2.0, norms)


def changes(
    network: Any, endings: tuple[str, ...], magnitude: str | None = None, size: float = 0.003
) -> dict[str, LowRank]:
    weights = {
        key.removesuffix(".weight"): w for key, w in network.state_dict().items() if key.endswith(".weight")
    }
    return {
        name: change(tuple(w.shape), magnitude, size) for name, w in weights.items() if name.endswith(endings)
    }


def other_change(number: int, w: torch.Tensor, size: float) -> Change:
    """A change by another algorithm than LoRA; of a vector its difference."""
    rows, columns = w.shape[0], w[0].numel()
    if w.ndim == 1 or number % 4 == 0:
        return Difference(size * torch.randn_like(w))
    if number % 4 == 1:
        down, up = size**0.5 * torch.randn(2, columns), torch.randn(rows, 2)
        return Hadamard(down, up, down, up)
    if number % 4 == 2:
        return Kronecker(size * torch.randn(2, 1), torch.randn(rows // 2, columns))
    return RowRotation(size * torch.randn(rows // 4, 4, 4))


def other_changes(network: Any, endings: tuple[str, ...], size: float) -> dict[str, Change]:
    """Changes of layers and their biases, by one algorithm after the other."""
    targets = {name.removesuffix(".weight"): w for name, w in network.state_dict().items()}
    endings += tuple(f"{ending}.bias" for ending in endings)
    chosen = [(name, w) for name, w in targets.items() if name.endswith(endings)]
    return {name: other_change(number // 2, w, size) for number, (name, w) in enumerate(chosen)}


STAGE_C_LAYERS = ("to_q", "out_proj", "channelwise.0", "mapper_sca", "depthwise", "clip_txt_mapper", "clf.1")
TEXT_LAYERS = ("self_attn.v_proj", "mlp.fc1")


def write_files(folder: Path) -> None:
    """LoRAs and embeddings for the demo cascade, into ComfyUI's folders and those of the other host."""
    stage_c = comfyui_model("demo").model.diffusion_model.network
    encoder: Any = headless.load_text_encoder(WEIGHTS / "demo_text_encoder").encoder.model
    width = encoder.config.hidden_size
    text = changes(encoder, TEXT_LAYERS, size=0.03)
    sun = 0.3 * torch.randn(3, width)
    rows = tuple(
        LearnedToken("", 0.3 * torch.randn(1, width), index) for index in (5, 40, encoder.config.vocab_size)
    )
    files: dict[str, tuple[str, Any, Any, Any]] = {
        "plain": ("kohya", changes(stage_c, STAGE_C_LAYERS), text, ()),
        "column": ("kohya", changes(stage_c, ("to_q", "channelwise.0"), "column"), {}, ()),
        "row": ("kohya", changes(stage_c, ("to_q", "channelwise.0"), "row"), {}, ()),
        "tokens": ("onetrainer", changes(stage_c, ("to_k",)), text, (LearnedToken("[sun]", sun),)),
        "rows": ("official", changes(stage_c, ("to_q", "to_k", "to_v", "out_proj"), size=0.001), {}, rows),
    }
    layers = ("to_q", "channelwise.0", "channelwise.4", "mapper_sca", "depthwise", "clf.1", "to_v")
    text_layers = ("self_attn.q_proj", "mlp.fc2", "layer_norm1", "final_layer_norm")
    others = other_changes(stage_c, layers, 0.03), other_changes(encoder, text_layers, 0.03)
    files["others"] = ("comfyui", *others, ())
    for name, (dialect, model, clip, tokens) in files.items():
        adapter = Adapter(name, dialect, model, clip, tokens)
        write_adapter(
            folder / "loras" / f"{name}.safetensors", adapter, dialect, stage_c, encoder.config.vocab_size
        )
    checkpoints.write_safetensors(folder / "embeddings" / "sun.safetensors", {"clip_g": sun}, {})
    for category in ("loras", "embeddings"):
        folder_paths.add_model_folder_path(category, str(folder / category))
    os.environ["CASCADE_MODELS"] = str(folder)


def comfyui_model(kind: str) -> Any:
    return comfyui.load_network("stage_c", WEIGHTS / f"{kind}_stage_c.safetensors", "fp32")


def apply(
    value: dict[str, Any], file: str, model: float = 1.0, clip: float = 1.0, new: str = ""
) -> dict[str, Any]:
    output = CascadeLoRAApply.execute(value["model"], f"{file}.safetensors", model, clip, value["clip"], new)
    return {**value, "model": only(output), "clip": only(output, 1)}


def states(clip: Any, prompt: str, host: Any = comfyui) -> Tensor:
    return host.encode_texts(clip, [prompt])[0][0][0]


def sample(model: Any, prompts: Any, host: Any = comfyui) -> Tensor:
    return host.sample(make_run("stage_c", model, prompts, steps=STEPS)).latent


def against_lora_loader(sockets: dict[str, dict[str, Any]], prompts: Any) -> dict[str, float]:
    """The same kohya file through our node and through LoraLoader, on our MODEL and on ComfyUI's own."""
    results = {}
    for program, value in sockets.items():
        for file in ("plain", "column"):
            ours = apply(value, file, 0.7, -0.6)
            theirs = nodes.LoraLoader().load_lora(
                value["model"], value["clip"], f"{file}.safetensors", 0.7, -0.6
            )
            results[f"same: {file}, our node and LoraLoader, MODEL {program}"] = relative(
                sample(ours["model"], prompts), sample(theirs[0], prompts)
            )
            results[f"other: {file}, MODEL {program}"] = relative(
                sample(ours["model"], prompts), sample(value["model"], prompts)
            )
    ours = apply(sockets["ours"], "plain", 0.7, -0.6)["clip"]
    theirs = nodes.LoraLoader().load_lora(None, sockets["ours"]["clip"], "plain.safetensors", 0.7, -0.6)[1]
    results["same: plain, our node and LoraLoader, CLIP"] = relative(
        states(ours, PROMPT), states(theirs, PROMPT)
    )
    results["other: plain, CLIP"] = relative(states(ours, PROMPT), states(sockets["ours"]["clip"], PROMPT))
    return results


def changed_by_patches(patcher: Any, dtype: torch.dtype) -> float:
    """The largest change of a weight by all its patches, of its largest number, computed in a precision."""
    weights = patcher.model.state_dict()
    changes = []
    for key, patches in patcher.patches.items():
        weight = weights[key].to(dtype)
        patched = comfy.lora.calculate_weight(patches, weight.clone(), key, intermediate_dtype=dtype)
        changes.append(relative(patched, weight))
    return max(changes)


def chains(value: dict[str, Any], prompts: Any) -> dict[str, float]:
    """Several LoRAs, then one taken back, then none left."""
    before, text = sample(value["model"], prompts), states(value["clip"], PROMPT)
    twice = apply(apply(value, "plain", 0.8, 0.8), "row", -0.4)
    restored = apply(apply(value, "plain", 0.8, 0.8), "plain", -0.8, -0.8)
    results = {
        **{
            f"same: one and its opposite, weights in {dtype}": changed_by_patches(restored["model"], dtype)
            for dtype in (torch.float32, torch.float64)
        },
        "other: two in a row": relative(sample(twice["model"], prompts), before),
        "same: one and its opposite": relative(sample(restored["model"], prompts), before),
        "same: one and its opposite, CLIP": relative(states(restored["clip"], PROMPT), text),
    }
    whole = sample(twice["model"], prompts)
    twice["model"].unpatch_model(torch.device("cpu"))
    twice["model"].partially_load(torch.device("cpu"), twice["model"].model_size() // 2)
    results["same: partly loaded"] = relative(sample(twice["model"], prompts), whole)
    results["none: after all of them"] = relative(sample(value["model"], prompts), before)
    results["none: after all of them, CLIP"] = relative(states(value["clip"], PROMPT), text)
    nothing = apply(value, "plain", 0.0, 0.0)
    assert nothing["model"] is value["model"]
    assert nothing["clip"] is value["clip"]
    return results


def against_headless(value: dict[str, Any], prompts: Any) -> dict[str, float]:
    """The two hosts' answers to the same file."""
    headless_sockets = {
        "model": headless.load_network("stage_c", WEIGHTS / "demo_stage_c.safetensors", "fp32"),
        "clip": headless.load_text_encoder(WEIGHTS / "demo_text_encoder"),
    }
    results = {}
    for file in ("plain", "column", "row", "tokens", "rows", "others"):
        ours, theirs = (
            with_file(host, sockets, file)
            for host, sockets in ((comfyui, value), (headless, headless_sockets))
        )
        latents = sample(ours["model"], prompts), sample(theirs["model"], prompts, headless)
        results[f"same: {file}, with and without ComfyUI"] = relative(*latents)
        if file == "others":
            results[f"other: {file}"] = relative(latents[0], sample(value["model"], prompts))
        for number, prompt in enumerate(TOKEN_PROMPTS):
            texts = states(ours["clip"], prompt), states(theirs["clip"], prompt, headless)
            results[f"same: {file}, prompt {number} with and without ComfyUI"] = relative(*texts)
    for number, prompt in enumerate(TOKEN_PROMPTS):
        prompt_text = prompt.lower().replace("[sun]", " embedding:sun ")
        texts = states(value["clip"], prompt_text), states(headless_sockets["clip"], prompt_text, headless)
        results[f"same: embedding, prompt {number} with and without ComfyUI"] = relative(*texts)
    spaced, plain = (
        "a embedding: sun on (embedding: sun:1.2) hill",
        "a embedding:sun on (embedding:sun:1.2) hill",
    )
    texts = states(value["clip"], spaced), states(headless_sockets["clip"], spaced, headless)
    results["same: embedding behind a space, with and without ComfyUI"] = relative(*texts)
    results["same: embedding behind a space or not"] = relative(texts[1], states(value["clip"], plain))
    return results


def with_file(host: Any, value: dict[str, Any], file: str) -> dict[str, Any]:
    """Applies a file as the node does, on either host."""
    path = folder_paths.get_full_path_or_raise("loras", f"{file}.safetensors")
    adapter = read_adapter(path, host.stage_config(value["model"]))
    new = [NewToken("[sun]", "^star</w>")]
    model, clip = host.with_adapter(value["model"], value["clip"], adapter, 0.7, 0.7, new)
    return {"model": model, "clip": clip}


def native_clip(name: str = "g") -> Any:
    """ComfyUI's own tokenizer and text encoder with CLIP's vocabulary; small, with random weights."""
    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96,
        "hidden_act": "gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
    }  # fmt: skip
    encoder = partial(
        comfy.sd1_clip.SDClipModel, layer="hidden", layer_idx=-1, textmodel_json_config=config,
        layer_norm_hidden_state=False, enable_attention_masks=True,
    )  # fmt: skip
    tokenizer = partial(comfy.sd1_clip.SDTokenizer, embedding_size=64, embedding_key="clip_g")
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name=name, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=encoder),
    )
    clip = comfy.sd.CLIP(target, folder_paths.get_folder_paths("embeddings"))
    clip.cond_stage_model.load_state_dict(randomise(clip.cond_stage_model, 0.3))
    return clip


def tokens_in_native_clip(folder: Path, model: Any) -> dict[str, float]:
    """Names against ComfyUI's own embeddings of the same vectors, in ComfyUI's own classes."""
    moon, rows = 0.3 * torch.randn(9, 64), 0.3 * torch.randn(2, 64)
    clip = native_clip()
    key = "clip_g.transformer.text_model.embeddings.token_embedding.weight"
    matrix = clip.cond_stage_model.state_dict()[key].float()
    cat, dog = 2368, 1929
    files = {
        "loras/moon": {"bundle_emb.moon.clip_g": moon},
        "loras/new": {
            "embeddings.embeddings": rows, "embeddings.indices": torch.tensor([49408, cat]),
        },
        "embeddings/moon": {"clip_g": moon},
        "embeddings/new": {"emb_params": matrix[[dog]] + rows[:1]},
        "embeddings/cat": {"emb_params": matrix[[cat]] + rows[1:]},
    }  # fmt: skip
    for name, tensors in files.items():
        checkpoints.write_safetensors(folder / f"{name}.safetensors", tensors, {})
    value = {"model": model, "clip": clip}
    before = states(clip, "a cat")
    taught = apply(apply(value, "new", new="[fernando] ^dog</w>"), "moon")["clip"]
    pairs = {
        "[moon]": "embedding:moon",
        "photo of [Moon], on (a [moon]:1.3) hill": "photo of embedding:moon , on (a embedding:moon :1.3) hill",
        "hill " * 70 + "[moon] hill": "hill " * 70 + "embedding:moon hill",
        "a [fernando] dog": "a embedding:new dog",
        "a cat": "a embedding:cat",
        "embedding:moon [moon]": "embedding:moon embedding:moon",
    }
    results = {
        f"same: {name.split(' hill hill')[0]}, as an embedding in ComfyUI": relative(
            states(taught, name), states(clip, embedding)
        )
        for name, embedding in pairs.items()
    }
    results["other: a changed row"] = relative(states(taught, "a cat"), before)
    results["other: a name"] = relative(states(taught, "[moon]"), states(clip, "[moon]"))
    results["none: tokens taken off, CLIP"] = relative(states(clip, "a cat"), before)
    tokens = taught.tokenize("a [moon] hill", return_word_ids=True)["g"][0]
    assert [len(token) for token in tokens] == [3] * 77
    assert type(clip.tokenizer.clip_g) is comfy.sd1_clip.SDTokenizer  # the given CLIP keeps its own
    return results


def trained(network: Any, path: Path) -> dict[str, Any]:
    """A LoRA of all layers, written as our trainer does after a run; returns its changes by layer."""
    kind = "stage_b" if network == "stage_b" else "stage_c"
    stage: Any = checkpoints.load_model(WEIGHTS / f"demo_{kind}.safetensors", kind, torch.float32)[0]
    encoder = headless.load_text_encoder(WEIGHTS / "demo_text_encoder").encoder
    settings = LoRASettings(network=network, rank=RANK, alpha=2.0, targets=("all",))
    text: Any = None  # captions, of which a file has no need
    more: Any = {"encoder": encoder} if network == "text_encoder" else {}
    task = LoRATask(stage, text, settings, ObjectiveSettings(), torch.float32, **more)
    state = {name: 0.02 * torch.randn_like(value) for name, value in task.trained.state_dict().items()}
    task.write(state, path, {})
    adapter = task.adapter(state, path.name)
    return dict(adapter.text if network == "text_encoder" else adapter.diffusion)


def trained_by_us(folder: Path, clip: Any) -> dict[str, float]:
    """LoRAs of Stage B and of the text encoder through ComfyUI's own loader: every weight is the trained one."""
    model = native.model("stage_b", WEIGHTS / "demo_stage_b.safetensors")
    results = {}
    for network in ("stage_b", "text_encoder"):
        layers = trained(network, folder / "loras" / f"trained_{network}.safetensors")
        both = nodes.LoraLoader().load_lora(model, clip, f"trained_{network}.safetensors", 1.0, 1.0)
        patcher = both[0] if network == "stage_b" else both[1].patcher
        weights, errors = patcher.model.state_dict(), []
        for name, change in layers.items():
            (key,) = [key for key in patcher.patches if key.endswith(f".{name}.weight")]
            weight = weights[key].float()
            patched = comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key)
            errors.append(relative(patched, weight + change.delta(tuple(weight.shape))))
        results[f"same: a trained LoRA of {network} by LoraLoader"] = max(errors)
        results[f"none: layers of {network} that LoraLoader leaves out"] = float(
            len(layers) - len(patcher.patches)
        )
    return results


def refusal(value: dict[str, Any], file: str) -> str:
    """The error that the node gives instead of a result."""
    try:
        apply(value, file)
    except CascadeError as error:
        return str(error)
    return ""


def check_refusals(folder: Path, value: dict[str, Any]) -> None:
    """Asserts that what ComfyUI cannot do is refused by name."""
    checkpoints.write_safetensors(
        folder / "loras" / "out.safetensors", {"clip_g_out": torch.randn(1, 64)}, {}
    )
    assert "at the text encoder's output, which ComfyUI" in refusal({**value, "clip": native_clip()}, "out")
    assert "The CLIP is a SD1ClipModel, not Stable" in refusal({**value, "clip": native_clip("l")}, "moon")
    assert "moon.safetensors teaches a token 64 wide" in refusal(value, "moon")


def measure() -> dict[str, float]:
    comfy.cli_args.args.fp32_text_enc = True  # as the host without ComfyUI
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        wide = native.wide_stage_c(folder)
        clip = only(loaders.CascadeTextEncoderLoader.execute("demo_text_encoder"))
        ours = {"model": comfyui_model("demo"), "clip": clip}
        theirs = {"model": native.model("stage_c", wide), "clip": clip}
        output = conditioning.CascadeTextEncode.execute(clip, PROMPT, "blue")
        prompts = only(output), only(output, 1)
        results = {
            **against_lora_loader({"ours": ours, "native": theirs}, prompts),
            **chains(ours, prompts),
            **against_headless(ours, prompts),
            **tokens_in_native_clip(folder, ours["model"]),
            **trained_by_us(folder, clip),
        }
        check_refusals(folder, ours)
        return results
