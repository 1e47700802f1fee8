"""LoRA files of every dialect, learned tokens, and how they change a network."""

from .adapter import Adapter, LearnedToken, LowRank

__all__ = ["Adapter", "LearnedToken", "LowRank"]
