# pyright: reportMissingImports=false
"""CLIP in ComfyUI: its own text encoder classes, built with a file's configuration.

They keep the host's names (`clip_g.transformer.text_model.…`), which its LoRA nodes look for.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
from torch import Tensor, nn

from ....cascade_core.adapters.embeddings import LEFT_OUT, embedding_names, missing, spellings
from ....cascade_core.text.clip import Shapes, TextConfig, load_clip
from ....cascade_core.text.encoder import carried_by, find_tokenizer
from ....cascade_core.text.foreign_syntax import describe_syntax
from ....cascade_core.text.known_words import describe_unknown_words
from ....cascade_core.text.tokenizer import Tokenizer
from ..roles import leaves_folder
from .progress import notify
from .weights import remember_file

# Option that our node gives to the tokenizer: the node's panel names syntax of other programs.
SYNTAX_IN_PANEL = "cascade_syntax_in_panel"


class TextModel(comfy.clip_model.CLIPTextModel):
    """Host's text transformer with a vocabulary and a projection of any size.  config: the file's"""

    config: dict[str, Any]

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        width, placement = config_dict["hidden_size"], {"dtype": dtype, "device": device}
        self.set_input_embeddings(operations.Embedding(config_dict["vocab_size"], width, **placement))
        set_norm_eps(self, config_dict)
        self.text_projection = operations.Linear(
            width, config_dict["projection_dim"], bias=False, **placement
        )


def set_norm_eps(network: nn.Module, config: dict[str, Any]) -> None:
    """Sets the config's epsilon; the host's classes use torch's default."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config["layer_norm_eps"]


class TextEncoder(comfy.sd1_clip.SDClipModel):
    """Host's text encoder with Stable Cascade's outputs: states before the final norm, projected pooled vector."""

    def __init__(self, config: dict[str, Any], device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            layer="hidden",
            layer_idx=-1,
            textmodel_json_config=dict(config),
            model_class=TextModel,
            special_tokens={
                "start": config["bos_token_id"],
                "end": config["eos_token_id"],
                "pad": config["eos_token_id"],
            },
            layer_norm_hidden_state=False,
            enable_attention_masks=True,
            return_projected_pooled=True,
            model_options={**(model_options or {}), "model_name": "clip_g"},
        )


class BackendAdapter:
    """Adapter of our tokenizer to transformers' interface, which the host's chunking expects."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def from_pretrained(self, path: str, **_: Any) -> "BackendAdapter":
        """Returns this tokenizer, where the host would build one from a folder."""
        return self

    def __call__(self, text: str) -> dict[str, list[int]]:
        tokens = self.tokenizer.tokens(text)
        return {"input_ids": [self.tokenizer.start_token, *tokens, self.tokenizer.end_token]}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.backend.get_vocab()


class SavedTokenizer(comfy.sd1_clip.SDTokenizer):
    """Host's chunking, plus tensors that the host's save nodes request from the tokenizer and store beside the weights.

    words: those that the text encoder was taught; empty: all. The node that encodes a prompt reports unknown words,
    and syntax of other programs.
    """

    def __init__(
        self,
        *arguments: Any,
        carried: Callable[[], dict[str, Tensor]],
        words: Sequence[str] = (),
        **others: Any,
    ):
        super().__init__(*arguments, **others)
        self.carried = carried
        self.words = tuple(words)

    def tokenize_with_weights(self, text: str, *arguments: Any, **options: Any) -> Any:
        if notice := describe_syntax(text):
            notify(notice, in_panel=SYNTAX_IN_PANEL in options.get("tokenizer_options", {}))
        if notice := describe_unknown_words([text], self.words):
            notify(notice)
        return super().tokenize_with_weights(text, *arguments, **options)

    def state_dict(self) -> dict[str, Tensor]:
        return self.carried()


def _carried(config: dict[str, Any], shapes: Shapes, tokenizer: Tokenizer) -> dict[str, Tensor]:
    return {f"clip_g.{name}": value for name, value in carried_by(config, shapes, tokenizer).items()}


def _on_meta(config: dict[str, Any], device: Any) -> TextModel:
    """The model on the meta device, built without transformers' classes, which take a second to import."""
    complete = asdict(TextConfig.from_dict(config))
    network = TextModel(complete, None, device, nn)
    network.config = complete
    return network


def load_text_encoder(path: Path) -> comfy.sd.CLIP:
    network = load_clip(path, "text", _on_meta, notify=notify)
    config: dict[str, Any] = network.config
    tokenizer = find_tokenizer(path, config["vocab_size"])
    config |= {"bos_token_id": tokenizer.start_token, "eos_token_id": tokenizer.end_token}
    weights = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    chunker = partial(
        SavedTokenizer,
        carried=partial(_carried, config, shapes, tokenizer),
        words=tokenizer.words,
        embedding_size=config["hidden_size"],
        embedding_key="clip_g",
        tokenizer_class=BackendAdapter(tokenizer),
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, clip_name="g", tokenizer=chunker),
        partial(comfy.sd1_clip.SD1ClipModel, clip_name="g", clip_model=partial(TextEncoder, config)),
    )
    parameters = sum(tensor.numel() for tensor in weights.values())
    embeddings = folder_paths.get_folder_paths("embeddings")
    if "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters:
        # Newer versions load the weights before placing the model.
        clip = comfy.sd.CLIP(target, embeddings, parameters=parameters, state_dict=[weights])
    else:
        clip = comfy.sd.CLIP(target, embeddings, parameters=parameters)
        clip.load_sd(weights)
    remember_file(clip, path.name)
    return clip


def _has_embedding(name: str) -> bool:
    """Whether ComfyUI finds the file of `embedding:name`."""
    folders = comfy.sd1_clip.expand_directory_list(folder_paths.get_folder_paths("embeddings"))
    return any(
        os.path.isfile(os.path.join(folder, spelling + ending))
        for folder in folders
        for spelling in spellings(name)
        if not leaves_folder(spelling)
        for ending in ("", ".safetensors", ".pt", ".bin")
    )


def encode_texts(clip: Any, prompts: Sequence[str]) -> list[list]:
    return [_encode_text(clip, prompt) for prompt in prompts]


def _encode_text(clip: Any, prompt: str) -> list:
    for name in embedding_names(prompt):  # also refuses names that ComfyUI's own parser would fail at
        if not _has_embedding(name):
            notify(f"{missing(name, ', '.join(folder_paths.get_folder_paths('embeddings')))}; {LEFT_OUT}.")
    tokens = clip.tokenize(prompt, tokenizer_options={SYNTAX_IN_PANEL: True})
    return clip.encode_from_tokens_scheduled(tokens)
