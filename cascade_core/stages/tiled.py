"""A network with a bounded receptive field on pictures of any size: whole where memory allows, else in tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.precision import compute_dtype
from ..networks.tiles import fitting_tile, join_tiles, seen_sides
from ..placement import RunBytes, WeightConsumer, largest_run, out_of_memory
from .device import ComputeDevice

MOST = 2_500_000_000  # bytes beside the weights from which larger tiles are hardly faster
LEAST = 500_000_000  # bytes beside the weights: other networks are evicted before tiles take less
LEAST_TILE = 16  # positions a side


@dataclass(frozen=True)
class Tiled:
    """A method of a network, `function`, on tiles that also read `halo` positions around them.

    device    where it runs
    estimate  of `activations`: values alive for (config, batch, height, width) in positions
    down, up  values a side of one position, in the input and in the output
    consumer  the engine that `function` calls in the network's place
    """

    device: ComputeDevice
    network: Any
    function: Callable[[Tensor], Tensor]
    halo: int
    estimate: Callable[..., int]
    down: int = 1
    up: int = 1
    consumer: WeightConsumer | None = None

    def __call__(self, x: Tensor, tile_positions: int) -> Tensor:
        """x: (B, C, h · down, w · down) -> (B, C', h · up, w · up) float32 in main memory.

        tile_positions: positions a side, 0: as the memory allows. Tiles get smaller where memory runs out nevertheless.
        """
        automatic = not tile_positions
        if automatic:
            tile_positions = self._fitting(x)
        while True:
            try:
                return self._in_tiles(x, tile_positions)
            except Exception as error:
                smaller = self._half(x, tile_positions)
                if not automatic or not out_of_memory(error) or smaller < LEAST_TILE:
                    raise
            tile_positions = smaller
            self.device.observer.notify(
                f"out of memory; trying again in tiles of {tile_positions * max(self.down, self.up)} pixels."
            )

    def _in_tiles(self, x: Tensor, tile_positions: int) -> Tensor:
        dtype = compute_dtype(self.network)

        def run(device: torch.device) -> Tensor:
            def part(seen: Tensor) -> Tensor:
                self.device.observer.check_interrupted()
                return self.function(seen.to(device, dtype)).float().cpu()

            return join_tiles(part, x, tile_positions, self.halo, self.down, self.up)

        workspace = self._bytes(x, self._area(x, tile_positions))
        known_bytes = self._known_bytes(x, tile_positions)
        return self.device.run(self.network, run, workspace, consumer=self.consumer, known_bytes=known_bytes)

    def _known_bytes(self, x: Tensor, tile_positions: int) -> RunBytes | None:
        """Bytes that tiles of these sizes took before; None where one of the sizes is new."""
        if self.consumer is None:
            return None
        sides = [seen_sides(side, tile_positions, self.halo) for side in self._positions(x)]
        return largest_run(
            [
                self.consumer.known_bytes((*x.shape[:2], height * self.down, width * self.down))
                for height, width in product(*sides)
            ]
        )

    def _positions(self, x: Tensor) -> tuple[int, int]:
        return x.shape[-2] // self.down, x.shape[-1] // self.down

    def _area(self, x: Tensor, tile_positions: int) -> int:
        """Number of positions that a tile reads, halo included."""
        height, width = self._positions(x)
        seen = tile_positions + 2 * self.halo if tile_positions else max(height, width)
        return min(height, seen) * min(width, seen)

    def _bytes(self, x: Tensor, area: int) -> int:
        dtype = compute_dtype(self.network)
        return self.estimate(self.network.config, len(x), area, 1) * dtype.itemsize

    def _fitting(self, x: Tensor) -> int:
        pool = self.device.pool
        if pool is None:
            return 0
        network: nn.Module = self.network
        free = max(pool.free_bytes(network, keep_others=True), min(pool.free_bytes(network), LEAST))
        free = min(free, MOST)
        return fitting_tile(*self._positions(x), self.halo, lambda area: self._bytes(x, area) <= free)

    def _half(self, x: Tensor, tile_positions: int) -> int:
        """The next smaller tile, which reads half as many positions."""
        most = self._area(x, tile_positions) // 2
        return fitting_tile(*self._positions(x), self.halo, lambda area: area <= most)
