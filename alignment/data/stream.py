"""Records in an order that depends on a seed and the position alone, so that a resumed run goes on where it was."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Stream(Generic[T]):
    """An endless stream in epochs. What comes at a position depends only on the seed and that position."""

    def __init__(self, records: Sequence[T], seed: int, shuffle: bool = True):
        self.records, self.seed, self.shuffle = records, seed, shuffle
        self._shuffled: tuple[int, list[int]] = (-1, [])  # the last epoch asked for, and its order

    def take(self, start: int, count: int) -> list[T]:
        """The records at positions start to start + count."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> T:
        epoch, index = divmod(position, len(self.records))
        return self.records[self._order(epoch)[index] if self.shuffle else index]

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
