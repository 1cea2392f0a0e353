"""The latest few things that took a moment to make, for the next who asks: fifty visitors watch the same recording."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Place(Generic[T]):
    def __init__(self) -> None:
        self.making = threading.Lock()
        self.made: list[T] = []


class Kept(Generic[T]):
    """The `most` things that were asked for last, by what they were made from. Any thread may ask."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._changing = threading.Lock()
        self._places: OrderedDict[Hashable, _Place[T]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for `key`, or is now. Whoever asks meanwhile waits for it; what `make` raises is not kept."""
        with self._changing:
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
            while len(self._places) > self.most:
                self._places.popitem(last=False)
        with place.making:
            if not place.made:
                place.made.append(make())
            return place.made[0]


def once(make: Callable[[], T]) -> Callable[[], T]:
    """The same for all callers, made when the first one asks, however many ask at that moment."""
    kept: Kept[T] = Kept(1)
    return lambda: kept.get(None, make)
