"""A dict that keeps its most recently used entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class LRU(OrderedDict[Hashable, T]):
    """Up to `size` entries; `get_or_create` drops the least recently returned ones."""

    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def get_or_create(self, key: Hashable, create: Callable[[], T]) -> T:
        if key not in self:
            self[key] = create()
            while len(self) > self._size:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]
