"""Spans that run whole, and whose recomputation is cut into checkpoints again.

NOTE [checkpoints in checkpoints]
1. A checkpoint keeps what it reads, and needs all that autograd keeps of it once it is recomputed. Where its
   recomputation is cut into parts that are checkpoints themselves, it needs what one of these keeps, and the maps
   between them. Forward runs once more for all but the last part: that one is recorded at once.
2. No tile is cut. So statistics of the whole map on the way (BatchNorm in training) cost nothing, where a tiled
   span runs once more for each of them.
3. The parts are those of a `Search` through the span alone. The ends of such spans are the few positions of the
   region with the fewest bytes, those of their parts a few more.

Reference: Griewank, Walther, "Algorithm 799: revolve", 2000, for checkpoints in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fxstream.planning.search import Option, Region, Search, State

__all__ = ["NestedRuns"]

OUTER, INNER = 8, 12
"""Positions at which such spans, and parts of them, may end."""
LEVELS = 4
"""Needs between the least and those of one checkpoint for which parts are looked for."""

Flat = Callable[[int, int], Sequence[Sequence[Option]]]


class _Stretch:
    """A part of a region as a region of its own.

    `gradients` are the bytes of those of its results, which whoever asks for the gradients of the span holds all
    the while; only its last part counts them by itself.
    """

    def __init__(self, region: Region, flat: Flat, start: int, ends: Sequence[int], gradients: float) -> None:
        self._region, self._flat, self._start = region, flat, start
        self.ends, self._gradients = list(ends), gradients

    def starts(self, end: int) -> list[int]:
        return [-1, *(position for position in self.ends if position < end)]

    def options(self, start: int, end: int) -> Sequence[Sequence[Option]]:
        kinds = self._flat(self._from(start), end)
        if end == self.ends[-1]:
            return kinds
        return [[replace(one, needs=one.needs + self._gradients) for one in options] for options in kinds]

    def weights(self, start: int, end: int) -> float:
        return self._region.weights(self._from(start), end)

    def largest(self, start: int, end: int) -> str:
        return self._region.largest(self._from(start), end)

    def _from(self, start: int) -> int:
        return self._start if start == -1 else start


class NestedRuns:
    """The ways to recompute the spans of a region in parts; `sizes` are the bytes live at each of its ends.

    `flat` gives the kinds of ways to run a part.
    """

    def __init__(self, region: Region, flat: Flat, sizes: Sequence[float]) -> None:
        self._region, self._flat = region, flat
        self._sizes = dict(zip(region.ends, sizes, strict=True))
        self._outer = {-1, region.ends[-1], *_smallest(region.ends, sizes, OUTER)}

    def starts(self, end: int) -> list[int]:
        """Where such a span up to this end may start."""
        return [start for start in self._outer if start < end] if end in self._outer else []

    def states(self, start: int, end: int) -> Iterator[State]:
        """The fastest parts of a span for some needs, from the least; none where it may not start or end here."""
        if start not in self._outer or end not in self._outer:
            return
        inside = [position for position in self._region.ends if start < position < end]
        inner = _smallest(inside, [self._sizes[position] for position in inside], INNER)
        stretch = _Stretch(self._region, self._flat, start, [*sorted(inner), end], self._sizes[end])
        search = Search([stretch])
        smallest = search.smallest()
        if smallest is None or not smallest.spans:
            return
        (dense, *_), *_ = self._flat(start, end)
        ratio = max(1.0, dense.needs / smallest.peak)
        for level in range(LEVELS):
            fastest = search.fastest(smallest.peak * ratio ** (level / LEVELS))
            if fastest is not None and fastest.spans:
                yield fastest


def _smallest(ends: Sequence[int], sizes: Sequence[float], most: int) -> list[int]:
    """At most so many ends: of each equal section of the region that where the fewest bytes are live."""
    best: dict[int, tuple[float, int]] = {}
    for end, size in zip(ends, sizes, strict=True):
        section = (end - ends[0]) * most // (ends[-1] + 1 - ends[0])
        best[section] = min(best.get(section, (size, end)), (size, end))
    return [end for _, end in best.values()]
