"""The tiles of a segment along one axis, by arithmetic: their number, and what they hold at most and in all.

Tiles that read nothing outside of the image repeat: their boxes are those of the tile one period before, moved by
the same number of pixels. Where the first and the last of these are is found by bisection, because boxes move on
from tile to tile. So nothing here takes longer for more tiles, and a tile is made when it is asked for.

Boxes that never repeat (a resampling by an odd ratio) are measured at a sample of tiles: what is held at most is
then an estimate to a pixel or two. Tiles themselves are always exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from fxstream.geometry.box import Interval
from fxstream.tiling.axes.bounds import AxisStep, AxisTile, BoundsPass, Ratio

__all__ = ["AxisTiles"]

SAMPLE = 64
"""Tiles that are measured where boxes do not repeat."""
Repeats = tuple[int, list[Ratio]]
"""After how many tiles boxes repeat, and by how many pixels each node's moves from one tile to the next."""


class AxisTiles(Sequence[AxisTile]):
    """`count` tiles, of which tile `i` owns ``owned(i)`` of the outputs."""

    def __init__(
        self, walk: BoundsPass, owned: Callable[[int], tuple[Interval, ...]], count: int, repeats: Repeats | None
    ) -> None:
        self._walk, self._owned, self._count, self._repeats = walk, owned, count, repeats
        self._made: dict[int, AxisTile] = {}

    @property
    def length(self) -> int:
        """The pixels of the finest output that a tile has."""
        return max(map(len, self._owned(0)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> AxisTile:  # type: ignore[override]
        if not -self._count <= i < self._count:
            raise IndexError(i)
        return self._tile(i % self._count)

    def __iter__(self) -> Iterator[AxisTile]:
        return map(self._tile, range(self._count))

    def _tile(self, i: int) -> AxisTile:
        """A tile, made anew where it does not repeat one that was made."""
        first, stop = self._inner
        if self._repeats is None or not first <= i < stop:
            return self._walk.tile(self._owned(i))
        period, ratios = self._repeats
        like = first + (i - first) % period
        if like not in self._made:
            self._made[like] = self._walk.tile(self._owned(like))
        tile = self._made[like]
        if i == like:
            return tile
        if tile.looks_up:
            return self._walk.tile(self._owned(i))
        moved = {n: (i - like) * num // den for n, (num, den) in zip(self._walk.names, ratios, strict=True)}
        return tile.at(self._owned(i), moved)

    @functools.cached_property
    def _inner(self) -> tuple[int, int]:
        """The first tile that reads nothing outside of the image, and the one after the last of these."""
        middle = self._count // 2
        if self._is_outer(middle):
            return 0, 0
        low, first = -1, middle
        while first - low > 1:
            tried = (low + first) // 2
            low, first = (tried, first) if self._is_outer(tried) else (low, tried)
        last, high = middle, self._count - 1  # the last tile may be shorter
        while high - last > 1:
            tried = (last + high) // 2
            last, high = (last, tried) if self._is_outer(tried) else (tried, high)
        return first, last + 1

    def _is_outer(self, i: int) -> bool:
        return i in (0, self._count - 1) or self._walk.measured(self._owned(i))[1]

    @functools.cached_property
    def classes(self) -> tuple[tuple[int, float], ...]:
        """Tiles that stand for all: the index of each, and how many it stands for."""
        first, stop = self._inner
        outer = [(i, 1.0) for i in (*range(first), *range(stop, self._count))]
        period = stop - first if self._repeats is None else min(self._repeats[0], stop - first)
        if len(outer) > SAMPLE and self._repeats is None:
            outer = [(i, len(outer) / SAMPLE) for i in _sample([i for i, _ in outer])]
        if period > SAMPLE and self._repeats is None:
            inner = [(i, (stop - first) / SAMPLE) for i in _sample(range(first, stop))]
        else:
            inner = [(first + k, float(-(-(stop - first - k) // period))) for k in range(period)]
        return tuple(sorted([*outer, *inner]))

    @property
    def places(self) -> Sequence[int]:
        """Tiles among which there is one like each other; all of them where boxes never repeat."""
        return range(self._count) if self._repeats is None else [i for i, _ in self.classes]

    @functools.cached_property
    def _lengths(self) -> tuple[dict[str, int], dict[str, float]]:
        """Of each node and spatial input the longest interval that a tile holds, and the sum over all tiles."""
        names = self._walk.names
        each = [(self._walk.measured(self._owned(i))[0], number) for i, number in self.classes]
        longest = map(max, zip(*(lengths for lengths, _ in each), strict=True))
        in_all = ([number * length for length in lengths] for lengths, number in each)
        return dict(zip(names, longest, strict=True)), dict(zip(names, map(sum, zip(*in_all)), strict=True))

    def largest(self, name: str) -> int:
        """The longest interval that a tile holds of a node or spatial input."""
        return self._lengths[0].get(name, 0)

    def total(self, name: str) -> float:
        """The pixels of a node or spatial input that all tiles together hold."""
        return self._lengths[1].get(name, 0.0)

    @functools.cached_property
    def _boxes(self) -> list[dict[str, Interval]]:
        """The boxes of a tile of each class."""
        return [self._walk.boxes(self._owned(i)) for i, _ in self.classes]

    def steps(self, index: int) -> list[AxisStep]:
        """How a node, given by its index in the segment, is evaluated on a tile of each class that needs it."""
        return [step for boxes in self._boxes if (step := self._walk.step(index, boxes)) is not None]


def _sample(indices: Sequence[int]) -> list[int]:
    """So many of them, evenly, the first and last among them."""
    return [indices[k * (len(indices) - 1) // (SAMPLE - 1)] for k in range(SAMPLE)]
