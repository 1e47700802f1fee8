"""What of transformers this project uses, untyped: reading the real package takes a type checker minutes."""

from typing import Any

from torch import nn

class CLIPTextModelWithProjection(nn.Module):
    config: Any
    text_model: Any
    text_projection: Any
    device: Any
    dtype: Any
    def __init__(self, config: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

class CLIPVisionModelWithProjection(nn.Module):
    config: Any
    device: Any
    dtype: Any
    def __init__(self, config: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

def __getattr__(name: str) -> Any: ...
