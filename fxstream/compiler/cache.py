"""A cache bounded in entries and in bytes: what was used least recently leaves first."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

__all__ = ["Cache"]

T = TypeVar("T")


class Cache:
    """Results by key, at most `size` of them, and at most so many bytes in all but the last.

    >>> cache = Cache(2)
    >>> [cache.get(key, lambda key=key: key.upper()) for key in "aba"], cache.get("c", lambda: "C"), "b" in cache
    (['A', 'B', 'A'], 'C', False)
    >>> cache = Cache(9, most_bytes=3, bytes_of=len)
    >>> [cache.get(key, lambda key=key: key) for key in ("a", "bbb", "cc")], len(cache)
    (['a', 'bbb', 'cc'], 1)
    """

    def __init__(
        self, size: int, most_bytes: float = math.inf, bytes_of: Callable[[Any], int] = lambda result: 0
    ) -> None:
        self._size, self._most_bytes, self._bytes_of = size, most_bytes, bytes_of
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result for a key, made where it is missing."""
        if key not in self._entries:
            self.put(key, make())
        self._entries.move_to_end(key)
        result: T = self._entries[key]
        return result

    def put(self, key: Hashable, result: object) -> None:
        """Keep a result; the one used least recently leaves where there are too many."""
        self._entries[key] = result
        self._entries.move_to_end(key)
        count = sum(map(self._bytes_of, self._entries.values()))
        while len(self._entries) > self._size or (count > self._most_bytes and len(self._entries) > 1):
            count -= self._bytes_of(self._entries.popitem(last=False)[1])
