"""Graphs of one picture that benchmarks/served.py times: this pack's nodes, ComfyUI's own, and both together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]
EXAMPLE = PACK / "example_workflows" / "api" / "text_to_image_published.json"
FILES = {
    "stage_c": "diffusion_models/stage_c_bf16.safetensors",
    "stage_b": "diffusion_models/stage_b_bf16.safetensors",
    "stage_a": "vae/stage_a.safetensors",
    "text": "text_encoders/stable_cascade_text_encoder.safetensors",
    "previewer": "vae/previewer.safetensors",
}
NEGATIVE = "blurry, text, watermark"
SIDE, STEPS = 1024, (20, 10)

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def native(seed: int, text: str) -> Graph:
    """ComfyUI's own nodes, loaders to decoder."""
    sampling = {"sampler_name": "euler_ancestral", "scheduler": "simple", "denoise": 1.0, "seed": seed}
    return {
        "1": node("UNETLoader", unet_name=Path(FILES["stage_c"]).name, weight_dtype="default"),
        "2": node("UNETLoader", unet_name=Path(FILES["stage_b"]).name, weight_dtype="default"),
        "3": node("VAELoader", vae_name=Path(FILES["stage_a"]).name),
        "4": node("CLIPLoader", clip_name=Path(FILES["text"]).name, type="stable_cascade"),
        "5": node("CLIPTextEncode", clip=["4", 0], text=text),
        "6": node("CLIPTextEncode", clip=["4", 0], text=NEGATIVE),
        "7": node("StableCascade_EmptyLatentImage", width=SIDE, height=SIDE, compression=42, batch_size=1),
        "8": node(
            "KSampler", model=["1", 0], positive=["5", 0], negative=["6", 0], latent_image=["7", 0], steps=STEPS[0],
            cfg=4.0, **sampling,
        ),
        "9": node("StableCascade_StageB_Conditioning", conditioning=["5", 0], stage_c=["8", 0]),
        "10": node("ConditioningZeroOut", conditioning=["5", 0]),
        "11": node(
            "KSampler", model=["2", 0], positive=["9", 0], negative=["10", 0], latent_image=["7", 1], steps=STEPS[1],
            cfg=1.1, **sampling,
        ),
        "picture": node("VAEDecode", vae=["3", 0], samples=["11", 0]),
    }  # fmt: skip


def mixed(seed: int, text: str) -> Graph:
    """ComfyUI's nodes on this pack's MODELs and VAE."""
    graph = native(seed, text)
    for number, kind in (("1", "stage_c"), ("2", "stage_b")):
        loader = {"stage_c": "StageCLoader", "stage_b": "StageBLoader"}[kind]
        graph[number] = node(loader, file=Path(FILES[kind]).name, dtype="auto")
    graph["3"] = node("StageAVAE", file=Path(FILES["stage_a"]).name)
    return graph


def ours(seed: int, text: str) -> Graph:
    """The shipped example for the published files."""
    graph = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    graph["5"]["inputs"]["positive"] = text
    for number in ("7", "8"):
        graph[number]["inputs"]["seed"] = seed
    (picture,) = (number for number, each in graph.items() if each["class_type"] == "CascadeDecode")
    graph["picture"] = graph.pop(picture)
    return {number: each for number, each in graph.items() if each["class_type"] != "SaveImage"}


def int8(seed: int, text: str) -> Graph:
    """`ours` with Stage C's and B's weights in 8 bits."""
    graph = ours(seed, text)
    for each in graph.values():
        if each["class_type"] in ("StageCLoader", "StageBLoader"):
            each["inputs"] = {**each["inputs"], "dtype": "int8"}
    return graph


def in_main_memory(graph: Graph) -> Graph:
    """The graph with only 64 × 64 pixels of the picture saved, whose PNG takes no time."""
    crop = node("ImageCrop", image=["picture", 0], width=64, height=64, x=0, y=0)
    return {**graph, "crop": crop, "end": node("PreviewImage", images=["crop", 0])}


def with_png(graph: Graph) -> Graph:
    return {**graph, "end": node("PreviewImage", images=["picture", 0])}


def made_small(graph: Graph) -> Graph:
    """The graph for tiny networks: 64 × 64 pixels, two steps."""
    small = {"width": 64, "height": 64, "steps": 2}
    return {
        number: {
            **each,
            "inputs": {**each["inputs"], **{k: v for k, v in small.items() if k in each["inputs"]}},
        }
        for number, each in graph.items()
    }


ROWS: dict[str, Callable[[int, str], Graph]] = {
    "ours": ours,
    "int8": int8,
    "mixed": mixed,
    "native": native,
    "headless": ours,
}
