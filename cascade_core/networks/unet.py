"""The U-Net skeleton that Stage B and Stage C share: levels of blocks down, the same up, skips between.

A level is `level_config[i]` (a string over C ResBlock, T TimestepBlock, A AttnBlock, F FeedForwardBlock), repeated
`blocks` times, and the whole level again `block_repeat` times with a 1×1 convolution between.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import UNetConfig
from .layers import (
    AttnBlock,
    FeedForwardBlock,
    ResBlock,
    TimestepBlock,
    layer_norm_2d,
    resize,
    timestep_embedding,
)


class UNet(nn.Module):
    """Builds the levels and runs them; the stages add the input, the conditions and the output."""

    def __init__(self, config: UNetConfig, operations=nn):
        super().__init__()
        self.config = config
        widths, levels = config.c_hidden, range(len(config.c_hidden))

        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            operations.Conv2d(config.c_in * config.patch_size**2, widths[0], kernel_size=1),
            layer_norm_2d(widths[0], operations),
        )
        self.down_downscalers = nn.ModuleList(
            self._resampler(widths[i - 1], widths[i], "down", i - 1, operations) if i else nn.Identity()
            for i in levels
        )
        self.down_blocks = nn.ModuleList(
            self._level(i, config.blocks[0][i], False, operations) for i in levels
        )
        self.down_repeat_mappers = nn.ModuleList(
            self._mappers(i, config.block_repeat[0][i], operations) for i in levels
        )

        # `blocks[1]` and `block_repeat[1]` are listed from the innermost level outwards.
        upward = levels[::-1]
        self.up_blocks = nn.ModuleList(
            self._level(i, config.blocks[1][-1 - i], i < len(widths) - 1, operations) for i in upward
        )
        self.up_repeat_mappers = nn.ModuleList(
            self._mappers(i, config.block_repeat[1][-1 - i], operations) for i in upward
        )
        self.up_upscalers = nn.ModuleList(
            self._resampler(widths[i], widths[i - 1], "up", i - 1, operations) if i else nn.Identity()
            for i in upward
        )
        self.clf = nn.Sequential(
            layer_norm_2d(widths[0], operations),
            operations.Conv2d(widths[0], config.c_out * config.patch_size**2, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )

    def _resampler(self, c_in: int, c_out: int, direction: str, boundary: int, operations) -> nn.Module:
        """Builds the layers between level `boundary` and the next: (B, c_in, …) -> (B, c_out, …)."""
        raise NotImplementedError

    def _block(self, kind: str, level: int, c_skip: int, operations) -> nn.Module:
        c, dropout = self.config.c_hidden[level], self.config.dropout[level]
        if kind == "C":
            return ResBlock(c, c_skip, self.config.kernel_size, dropout, operations)
        if kind == "T":
            return TimestepBlock(c, self.config.c_r, self.config.t_conds, operations)
        if kind == "A":
            heads, self_attn = self.config.nhead[level], self.config.self_attn[level]
            return AttnBlock(c, self.config.c_cond, heads, self_attn, dropout, operations)
        return FeedForwardBlock(c, dropout, operations)

    def _level(self, level: int, count: int, with_skip: bool, operations) -> nn.ModuleList:
        kinds = self.config.level_config[level] * count
        c_skip = self.config.c_hidden[level] if with_skip else 0
        return nn.ModuleList(
            self._block(kind, level, c_skip if i == 0 else 0, operations) for i, kind in enumerate(kinds)
        )

    def _mappers(self, level: int, repeats: int, operations) -> nn.ModuleList:
        c = self.config.c_hidden[level]
        return nn.ModuleList(operations.Conv2d(c, c, kernel_size=1) for _ in range(repeats - 1))

    def embed_timesteps(self, r: Tensor, extra: dict[str, Tensor | None]) -> Tensor:
        """r and each of `t_conds` (zero where absent): (B,) -> (B, c_r · (1 + len(t_conds))) float32"""
        conditions = [r]
        for name in self.config.t_conds:
            condition = extra.get(name)
            conditions.append(torch.zeros_like(r) if condition is None else condition.to(r.device))
        return torch.cat([timestep_embedding(condition, self.config.c_r) for condition in conditions], dim=1)

    def run_levels(
        self, x: Tensor, timesteps: Tensor, tokens: Tensor, control: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """Runs all levels down and up.

        x: (B, c_hidden[0], H, W), timesteps: (B, R · n), tokens: (B, T, c_cond) -> (B, c_hidden[0], H, W);
        control[i] is added before the i-th ResBlock that runs, resized to its positions.
        """
        residuals = iter(control)
        skips: list[Tensor] = []
        for downscaler, blocks, mappers in zip(
            self.down_downscalers, self.down_blocks, self.down_repeat_mappers, strict=True
        ):
            x = self._apply_resampler(x, downscaler)
            x = self._run_level(x, blocks, mappers, timesteps, tokens, None, residuals)
            skips.append(x)
        skip = None
        skips.pop()  # the innermost level goes straight up
        for blocks, mappers, upscaler in zip(
            self.up_blocks, self.up_repeat_mappers, self.up_upscalers, strict=True
        ):
            x = self._run_level(x, blocks, mappers, timesteps, tokens, skip, residuals)
            x = self._apply_resampler(x, upscaler)
            skip = skips.pop() if skips else None
        return x

    def _apply_resampler(self, x: Tensor, resampler: Any) -> Tensor:
        """Takes x from one level to the next; there is no resampler into the outermost level."""
        return resampler(x)

    def _apply_mapper(self, x: Tensor, mapper: nn.Module) -> Tensor:
        """Maps x between two repeats of a level."""
        return mapper(x)

    def _add_control(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds a ControlNet's residual (B, C, h, w), resized to the positions of x."""
        return x + resize(residual, x.shape[-2:]).to(x)

    def levels(self) -> list[tuple[list[nn.Module], int]]:
        """Each level's blocks with how often a forward runs them, in the order of a forward."""
        directions = [
            (self.down_blocks, self.down_repeat_mappers),
            (self.up_blocks, self.up_repeat_mappers),
        ]
        return [
            (list(blocks), len(mappers) + 1)  # type: ignore[arg-type]
            for direction in directions
            for blocks, mappers in zip(*direction, strict=True)
        ]

    def _run_level(
        self,
        x: Tensor,
        blocks,
        mappers,
        timesteps: Tensor,
        tokens: Tensor,
        skip: Tensor | None,
        residuals: Iterator,
    ) -> Tensor:
        """Runs one level, as often as it repeats."""
        for repeat in range(len(mappers) + 1):
            for i, block in enumerate(blocks):
                if isinstance(block, ResBlock):
                    block_skip = skip if i == 0 else None
                    if block_skip is not None:  # sizes differ where a level does not divide the one above
                        x = resize(x, block_skip.shape[-2:])
                    residual = next(residuals, None)
                    if residual is not None:
                        x = self._add_control(x, residual)
                    x = block(x, block_skip)
                elif isinstance(block, AttnBlock):
                    x = block(x, tokens)
                elif isinstance(block, TimestepBlock):
                    x = block(x, timesteps)
                else:
                    x = block(x)
            if repeat < len(mappers):
                x = self._apply_mapper(x, mappers[repeat])
        return x
