"""Mutated weight files through every loader that takes one, in graphs on tiny networks, `convert-lora` and the door."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from cascade_nodes.cascade_core.adapters import (
    DIALECTS,
    Adapter,
    LearnedToken,
    LowRank,
    read_adapter,
    write_adapter,
)
from cascade_nodes.cascade_core.checkpoints import (
    ALL_IN_ONE,
    DIFFUSERS,
    holds,
    layout_named,
    read_weights,
    write_safetensors,
)
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.networks.stage_c import StageC
from cascade_nodes.cascade_core.pipeline import StableCascade, StageSettings
from cascade_nodes.headless.convert_lora import convert_lora
from cascade_nodes.headless.models import list_models
from cascade_nodes.headless.run import run_graph
from cascade_nodes.tests.bad_input.graphs import LOADERS, TINY, TINY_FILES, graphs
from cascade_nodes.tests.fuzz import weights
from cascade_nodes.tests.fuzz.values import odd_value
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.controlnets import write_controlnet
from cascade_nodes.tests.nodes.tiny import CONFIGS, TEXT_WIDTH, write_cascade

ATTENTION = [f"{way}_blocks.{level}.2.attention.attn.{part}" for way in ("down", "up") for level in (0, 1)
             for part in ("to_q", "to_k", "to_v", "out_proj")]  # fmt: skip
TEXT = [f"text_model.encoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


class World:
    """Good files, of which each case spoils a copy."""

    def __init__(self, folder: Path):
        self.folder, self.models = folder, folder / "models"
        os.environ["CASCADE_MODELS"] = str(self.models)
        torch.set_num_threads(1)
        write_cascade(self.models)
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save("in.png")
        self.controlnet = self.models / "controlnet" / write_controlnet(self.models, "canny")
        self.loras = self.write_loras(folder / "loras")
        self.write_checkpoints(folder / "checkpoints")
        self.graphs = self.write_graphs()
        self.kinds = [
            *LOADERS,
            "ControlNet",
            *(["LoRA"] * 4),
            "embedding",
            "encoder folder",
            "checkpoint",
            "diffusers",
            "shards",
            "peft",
            "door",
        ]

    def write_loras(self, folder: Path) -> list[Path]:
        def change(width: int) -> LowRank:
            return LowRank(torch.randn(2, width), torch.randn(width, 2), 1.0)

        stage_c = StageC.from_config(CONFIGS["stage_c"]).config
        layers, text = {name: change(32) for name in ATTENTION}, {name: change(TEXT_WIDTH) for name in TEXT}
        word = LearnedToken("[sun]", torch.randn(2, TEXT_WIDTH))
        paths = []
        for name, dialect in DIALECTS.items():
            numbered = name in ("official", "embedding")
            words = (LearnedToken("", torch.randn(1, TEXT_WIDTH), 3) if name == "official" else word,)
            parts = Adapter(
                name,
                name,
                {} if name == "embedding" else layers,
                text if dialect.text is not None and not numbered else {},
                words if dialect.tokens is not None else (),
            )
            paths.append(folder / f"{name}.safetensors")
            write_adapter(paths[-1], parts, name, stage_c)
        write_safetensors(folder / "clip_g.safetensors", {"clip_g": word.vectors}, {})
        return paths

    def write_checkpoints(self, folder: Path) -> None:
        """Writes the networks all in one, in shards, and as a folder of diffusers."""
        networks = {
            part: read_weights(self.models / TINY_FILES[words], part)[0]
            for part, words in (
                ("stage_c", "Stage C"),
                ("compressor", "semantic compressor"),
                ("stage_b", "Stage B"),
                ("stage_a", "Stage A"),
            )
        }
        whole = layout_named("stage_c", ALL_IN_ONE).from_published(networks["stage_c"]) | layout_named(
            "compressor", ALL_IN_ONE
        ).from_published(networks["compressor"])
        write_safetensors(
            folder / "whole.safetensors", {name: tensor.clone() for name, tensor in whole.items()}, {}
        )
        names = sorted(networks["stage_c"])
        places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
        for file in set(places.values()):
            write_safetensors(
                folder / "shards" / file,
                {name: networks["stage_c"][name] for name in names if places[name] == file},
                {},
            )
        (folder / "shards" / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
        for part, place in (("stage_b", "decoder"), ("stage_a", "vqgan"), ("stage_c", "prior")):
            tensors = {
                name: tensor.clone()
                for name, tensor in layout_named(part, DIFFUSERS).from_published(networks[part]).items()
            }
            write_safetensors(
                folder / "diffusers" / place / "diffusion_pytorch_model.safetensors", tensors, {}
            )
            shown = {"block_out_channels": [32, 32], "num_attention_heads": [2, 2],
                "_class_name": "StableCascadeUNet", "self_attn": True,
                     "level_config": [], "scale_factor": 0.43, "switch_level": [False]}  # fmt: skip
            (folder / "diffusers" / place / "config.json").write_text(json.dumps(shown))
        (folder / "diffusers" / "model_index.json").write_text("{}")

    def write_graphs(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """{kind: (the input that names the file, a graph that has it)}"""
        basic = graphs()
        for text in TINY:
            place, _, value = text.partition("=")
            key, _, name = place.partition(".")
            basic["picture.json"][key]["inputs"][name] = value
        found = {kind: (loader, basic[graph]) for kind, (loader, graph) in LOADERS.items()}
        plain = copy.deepcopy(basic["picture.json"])
        plain["7"]["inputs"]["positive"] = ["5", 0]
        for name in ("11", "12", "13"):
            plain.pop(name)
        lora = copy.deepcopy(plain)
        lora["20"] = node(
            "CascadeLoRAApply", model=["1", 0], clip=["4", 0], file="", strength_model=1.0, strength_clip=1.0
        )
        lora["5"]["inputs"] |= {"clip": ["20", 1], "positive": "a red [sun] star"}
        lora["7"]["inputs"]["model"] = ["20", 0]
        control = copy.deepcopy(plain)
        control |= {
            "20": node("LoadImage", image="in.png"),
            "21": node("CascadeCanny", image=["20", 0], low=100, high=200, size=64),
            "22": node("CascadeControlNetLoader", file=""),
            "23": node("CascadeControlNetApply", positive=["5", 0], negative=["5", 1], control_net=["22", 0],
            image=["21", 0],
                       strength=1.0, start=0.0, end=1.0),
        }  # fmt: skip
        control["7"]["inputs"] |= {"positive": ["23", 0], "negative": ["23", 1]}
        checkpoint = copy.deepcopy(plain)
        checkpoint["1"] = node("CascadeCheckpointLoader", file="", dtype="auto")
        decoder = copy.deepcopy(plain)
        decoder["2"] = node("CascadeCheckpointLoader", file="", dtype="auto")
        decoder["9"]["inputs"]["vae"] = ["2", 2]
        embedding = copy.deepcopy(plain)
        embedding["5"]["inputs"]["positive"] = "a red embedding:odd star"
        return found | {
            "encoder folder": ("4.file", plain), "LoRA": ("20.file", lora), "ControlNet": ("22.file", control),
            "shards": ("1.file", plain),
            "checkpoint": ("1.file", checkpoint), "diffusers": ("2.file", decoder), "embedding": ("",
            embedding), "peft": ("20.file", lora),
        }  # fmt: skip

    def attempt(self, random: Random) -> None:
        kind = random.choice(self.kinds)
        odd = self.folder / "odd"
        odd.mkdir()
        try:
            if kind == "door":
                self.door(random, odd)
                return
            path = self.spoiled(kind, random, odd)
            way = random.random()
            if kind in ("LoRA", "peft") and way < 0.3:
                self.convert(path, random)
            elif way < 0.35 and path.is_file():
                read_adapter(path) if kind == "LoRA" else [
                    holds(path, part) for part in ("stage_c", "stage_b", "stage_a")
                ]
            else:
                self.run(kind, path)
        finally:
            shutil.rmtree(odd)
            shutil.rmtree(self.folder / "output", ignore_errors=True)
            shutil.rmtree(self.models / "embeddings", ignore_errors=True)

    def spoiled(self, kind: str, random: Random, odd: Path) -> Path:
        """A spoiled copy of what a loader of this kind takes."""
        if kind in ("encoder folder", "shards", "diffusers", "peft"):
            return self.spoiled_folder(kind, random, odd)
        sources = {
            "LoRA": self.loras,
            "ControlNet": [self.controlnet],
            "checkpoint": [self.folder / "checkpoints" / "whole.safetensors"],
        }
        sources["embedding"] = [
            self.folder / "loras" / "clip_g.safetensors",
            self.folder / "loras" / "embedding.safetensors",
        ]
        source = random.choice(sources[kind] if kind in sources else [self.models / TINY_FILES[kind]])
        path = odd / random.choice(
            ("odd.safetensors",) * 6 + ("odd.gguf", "odd.pt", "odd.bin", "ödd 𝒳.safetensors", "odd")
        )
        shutil.copy(source, path)
        if kind == "text encoder":
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(source.parent / name, odd)
        weights.mutate(path, random)
        return path

    def spoiled_folder(self, kind: str, random: Random, odd: Path) -> Path:
        folder = odd / "folder"
        if kind == "peft":
            folder.mkdir()
            shutil.copy(self.folder / "loras" / "peft.safetensors", folder / "adapter_model.safetensors")
            stated = {
                "lora_alpha": 4,
                "r": 2,
                "alpha_pattern": {"(a+)+$": 1.0, "to_q": 2.0},
                "use_rslora": False,
                "peft_type": "LORA",
            }
            (folder / "adapter_config.json").write_text(json.dumps(stated))
        else:
            source = (
                self.folder / "checkpoints" / kind
                if kind != "encoder folder"
                else self.models / "text_encoders" / "tiny_text_encoder"
            )
            shutil.copytree(source, folder)
            if kind == "encoder folder" and random.random() < 0.5:
                header, body = weights.read(folder / "model.safetensors")
                (folder / "config.json").write_text(header.pop("__metadata__")["config"])
                weights.write(folder / "model.safetensors", header, body)
        for _ in range(random.choice((1, 1, 2))):
            spoil_file(
                random.choice(
                    [path for path in sorted(folder.rglob("*")) if path.is_file()] or [folder / "x.json"]
                ),
                random,
            )
        if kind == "peft":
            return folder / "adapter_model.safetensors"
        if kind == "shards" and random.random() < 0.8:
            return folder / random.choice(
                ("model.safetensors.index.json", "model-00001-of-00002.safetensors")
            )
        return folder

    def run(self, kind: str, path: Path) -> None:
        place, graph = self.graphs[kind]
        graph = copy.deepcopy(graph)
        if kind == "embedding":
            target = self.models / "embeddings" / "odd.safetensors"
            target.parent.mkdir()
            shutil.copy(path, target)
        else:
            key, _, name = place.partition(".")
            graph[key]["inputs"][name] = str(path.relative_to(self.folder))
        run_graph(graph)

    def convert(self, path: Path, random: Random) -> None:
        target = self.folder / "odd" / "converted.safetensors"
        try:
            model = self.models / TINY_FILES["Stage C"]
            convert_lora(path, target, random.choice(list(DIALECTS)), model, partial=random.random() < 0.5)
        except CascadeError:
            assert not target.exists(), "a file was written though it was refused"
            raise
        assert read_adapter(target, StageC.from_config(CONFIGS["stage_c"]).config)

    def door(self, random: Random, odd: Path) -> None:
        """A whole models folder in which one file is spoiled, as Python sees it, and as `cascade models` lists it."""
        shutil.copytree(self.models, odd / "models")
        files = [path for path in sorted((odd / "models").rglob("*")) if path.is_file()]
        spoil_file(random.choice(files), random)
        os.environ["CASCADE_MODELS"] = str(odd / "models")
        try:
            list_models(as_json=random.random() < 0.5)
            with StableCascade.load(odd / "models", device="cpu", prefer="lite") as cascade:
                cascade("a red star", size=(64, 64), seed=1, steps=1, decoder=StageSettings(steps=1, cfg=1.0))
        finally:
            os.environ["CASCADE_MODELS"] = str(self.models)


def spoil_file(path: Path, random: Random) -> None:
    """One file of a folder: weights in their ways, text as text."""
    way = random.random()
    if way < 0.06:
        path.unlink(missing_ok=True)
    elif way < 0.1:
        path.unlink(missing_ok=True)
        random.choice(
            (
                path.mkdir,
                lambda: os.mkfifo(path),
                lambda: path.symlink_to(path.name),
                lambda: path.symlink_to("/dev/zero"),
            )
        )()
    elif path.suffix == ".safetensors":
        weights.mutate(path, random)
    elif path.suffix == ".json" and way < 0.7:
        spoil_json(path, random)
    else:
        path.write_bytes(weights.spoiled_bytes(path.read_bytes() or b"x", random))


def spoil_json(path: Path, random: Random) -> None:
    try:
        content = json.loads(path.read_text())
    except ValueError:  # spoiled before
        return
    for _ in range(random.choice((1, 1, 3))):
        weights.spoil(content, random)
    try:
        text = json.dumps(content)
    except (ValueError, RecursionError):
        text = "[" * 100_000
    if random.random() < 0.15:
        text = (
            json.dumps(odd_value(random, 0.0) if random.random() < 0.5 else [content])
            if random.random() < 0.5
            else text[: len(text) // 2]
        )
    path.write_text(text)
