"""Training data that is drawn during training and stays on the accelerator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Draw = Callable[[int], Sequence[Tensor]]


class Pool:
    """Rows of several tensors, drawn in parts: `first` parts before the first step, then one every `every` steps.

    draw(number) gives part `number`, each of its tensors with as many rows. There is room for `parts` of them. After
    that, a new part replaces the oldest if `endless`, else drawing ends. The rows depend on the step alone, so that a
    resumed run has the same.
    """

    def __init__(self, draw: Draw, parts: int, first: int = 1, every: int = 1000, endless: bool = False):
        self.draw, self.parts, self.first, self.every, self.endless = draw, parts, first, every, endless
        self.drawn, self.rows = 0, 0
        self.tensors: list[Tensor] = []

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Draws the parts that are due at this step."""
        due = self.first + step // self.every
        if not self.endless:
            due = min(due, self.parts)
        for number in range(max(self.drawn, due - self.parts), due):
            self._put(number % self.parts, self.draw(number))
            self.drawn = number + 1

    def _put(self, place: int, part: Sequence[Tensor]) -> None:
        size = len(part[0])
        if not self.tensors:
            self.tensors = [value.new_empty(self.parts * size, *value.shape[1:]) for value in part]
        for tensor, value in zip(self.tensors, part, strict=True):
            tensor[place * size : place * size + size] = value
        self.rows = max(self.rows, (place + 1) * size)

    def take(self, count: int) -> list[Tensor]:
        """Random rows of every tensor, with replacement."""
        rows = torch.randint(self.rows, (count,), device=self.tensors[0].device)
        return [tensor[rows] for tensor in self.tensors]
