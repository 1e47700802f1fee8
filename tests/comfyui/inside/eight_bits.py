"""8-bit weights inside ComfyUI against the same without it: latents, LoRAs, sizes, and the files that are saved."""

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sd
import comfy.utils
import native
import torch
from comparing import relative
from placement_card import CONFIGS, LATENTS, POOLED, TEXT, prompts, same, sample, write_networks
from placement_patches import by_core, hooked
from torch import Tensor

from cascade_nodes.cascade_core import checkpoints
from cascade_nodes.cascade_core.adapters import Adapter, LowRank
from cascade_nodes.cascade_core.checkpoints.carried import is_carried
from cascade_nodes.cascade_core.networks.quantisation import FORMATS, quantised_layers
from cascade_nodes.nodes.hosts import comfyui, headless

CPU = torch.device("cpu")


def layers(model: Any) -> dict[str, Any]:
    return dict(quantised_layers(model.model.diffusion_model.network))


def without_comfyui(kind: str, stage: Any) -> Tensor:
    """The latent of `sample`, without ComfyUI."""
    request = comfyui_request(kind, stage)
    return headless.sample(request).latent


def comfyui_request(kind: str, model: Any) -> Any:
    from interop import make_run

    shift = 2.0 if kind == "stage_c" else 1.0
    return make_run(kind, model, prompts(kind), latent=torch.zeros(LATENTS[kind]), shift=shift, steps=2)


def lora(model: Any) -> Adapter:
    """A LoRA of some of the layers in 8 bits."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, layer in list(layers(model).items())[::2]:
        if layer.weight.ndim == 2:
            rows, columns = layer.weight.shape
            down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            changes[name] = LowRank(down, 0.03 * up)
    return Adapter("lora", "kohya", changes, {}, ())


def with_lora(host: Any, model: Any, adapter: Adapter) -> Any:
    return host.with_adapter(model, None, adapter, 0.8, 0, [])[0]


def one(kind: str, dtype: str, path: Path) -> dict[str, Any]:
    model, stage = comfyui.load_network(kind, path, dtype), headless.load_network(kind, path, dtype)
    plain = comfyui.sample(comfyui_request(kind, model)).latent
    loaded = {name: (layer.weight, layer.weight_scale) for name, layer in layers(model).items()}
    outside = dict(quantised_layers(stage.network))
    network = model.model.diffusion_model.network
    sizes = {
        "of the weights": sum(t.nbytes for t in (*network.parameters(), *network.buffers())),
        "model_size": model.model_size(),
        "a clone's": model.clone().model_size(),
        "loaded": model.loaded_size(),
    }
    keyed, file = model.get_key_patches("diffusion_model."), checkpoints.read_safetensors(path)[0]
    others = checkpoints.split_attention(file)
    originals = [
        name
        for name, tensor in others.items()
        if not same(_values(keyed[f"diffusion_model.{name}"]), tensor.float())
    ]
    adapter = lora(model)
    if kind == "stage_c":
        patched = with_lora(comfyui, model, adapter)
        right = without_comfyui(kind, with_lora(headless, stage, adapter))
    else:
        patched, right = by_core(model), None
    changed = comfyui.sample(comfyui_request(kind, patched)).latent
    again = comfyui.sample(comfyui_request(kind, model)).latent
    restored = all(
        layer.weight.data_ptr() == loaded[name][0].data_ptr() and layer.weight_scale is loaded[name][1]
        for name, layer in layers(model).items()
    )
    return {
        "as without ComfyUI": relative(plain, without_comfyui(kind, stage)),
        "other weights": [
            name
            for name, layer in layers(model).items()
            if not all(map(same, layer.quantised, outside[name].quantised))
        ],
        "sizes": sizes,
        "not the originals": originals,
        "layers": len(loaded),
        "LoRA, as without ComfyUI": 0.0 if right is None else relative(changed, right),
        "the LoRA's effect": relative(changed, plain),
        "after the LoRA": relative(again, plain) if restored else 1.0,
        **saved(kind, dtype, path, model, patched, changed),
        **in_part(kind, path, dtype, patched),
        **areas(kind, model, path),
    }


def _values(entry: list) -> Tensor:
    """What a merge takes of `get_key_patches`."""
    tensor, convert = entry[0]
    return convert(tensor.to(torch.float32, copy=True), inplace=True)


def saved(kind: str, dtype: str, path: Path, model: Any, patched: Any, latent: Tensor) -> dict[str, Any]:
    """ModelSave's file of a patched MODEL, read by both hosts and by ComfyUI's own network."""
    file = path.parent / f"saved_{kind}_{dtype}.safetensors"
    metadata = {"kind": kind, "config": json.dumps(CONFIGS[kind])}
    comfy.sd.save_checkpoint(str(file), patched, metadata=metadata)
    tensors = checkpoints.read_safetensors(file)[0]
    stated = [name for name in tensors if name.endswith(".comfy_quant")]
    scales = {name: tensors[name.replace("comfy_quant", "weight_scale")] for name in stated}
    again, outside = comfyui.load_network(kind, file, dtype), headless.load_network(kind, file, dtype)
    found = comfyui.sample(comfyui_request(kind, again)).latent
    comfy.sd.save_checkpoint(str(path.parent / "again.safetensors"), again, metadata=metadata)
    second = checkpoints.read_safetensors(path.parent / "again.safetensors")[0]
    return {
        "stated": len(stated),
        "scales": sorted({str(tuple(scale.shape)).replace(str(len(scale)), "rows") if scale.ndim else "one"
                          for scale in scales.values()}),
        "saved, as it ran": relative(found, latent),
        "saved, without ComfyUI": relative(without_comfyui(kind, outside), found),
        "saved again": sorted(second.keys() ^ tensors.keys())
        or [name for name in tensors if not same(second[name], tensors[name])],
        **by_comfyui(kind, file, tensors, again),
    }  # fmt: skip


def by_comfyui(kind: str, file: Path, tensors: dict[str, Tensor], ours: Any) -> dict[str, float]:
    """ComfyUI's own network of the file, where it reads such files, against ours."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return {}
    prefix = "model.diffusion_model."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    network = ours.model.diffusion_model.network
    config = native.CONFIGS[kind](dict(checkpoints.load_model(file, kind)[2]))
    config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    config.set_inference_dtype(torch.float32, torch.float32)
    base = config.get_model({}, device="cpu")
    # It loads only names that it knows.
    weights = {name: tensor for name, tensor in weights.items() if not is_carried(name)}
    base.diffusion_model.load_state_dict(weights, strict=True)
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = (random(*LATENTS[kind]), torch.tensor([0.4]))
    if kind == "stage_c":
        inputs += (random(1, 9, TEXT), random(1, 1, POOLED), random(1, 1, network.config.c_clip_img))
    else:
        inputs += (random(1, 16, 3, 3), random(1, 1, POOLED))
    return {"ComfyUI's own network": relative(base.diffusion_model(*inputs), network(*inputs))}


def in_part(kind: str, path: Path, dtype: str, patched: Any) -> dict[str, float]:
    """Latents of a MODEL that ComfyUI's own patcher loads in part, as on a card that is not NVIDIA's."""
    whole = sample(kind, patched)
    patched.unpatch_model(CPU)
    patched.partially_load(CPU, patched.model_size() // 2)
    found = {"in part": relative(sample(kind, patched), whole)}
    patched.unpatch_model(CPU)
    return found


def areas(kind: str, model: Any, path: Path) -> dict[str, float]:
    """LoRAs of areas and schedules, as on a card, and then none."""
    before = sample(kind, model)
    found = [sample(kind, model, prompts=hooked(kind, model, areas=True), steps=3) for _ in range(2)]
    return {
        "hooks' effect": relative(found[0], before),
        "hooks again": relative(*found),
        "after hooks": relative(sample(kind, model), before),
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        files = write_networks(Path(name))
        return {
            f"{kind}, {dtype}": one(kind, dtype, files[kind])
            for kind, dtype in product(("stage_c", "stage_b"), FORMATS)
        }
