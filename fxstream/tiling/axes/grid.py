"""The grid of tiles of one segment along one axis.

Tiles partition the outputs in intervals of equal length, the last one shorter: that gives the fewest tile
classes, and no more arithmetic than any other partition into as many tiles. The grid is the coarsest whose tiles
all read no more than the bound. Several outputs, at any resolution, are cut at the same places, so that tiles
repeat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from fxstream.geometry.box import Interval
from fxstream.tiling.axes.axis_tiles import AxisTiles
from fxstream.tiling.axes.bounds import BoundsPass, Ratio
from fxstream.tiling.axes.uniform_tiles import Moves, UniformTiles
from fxstream.tiling.request import Request, tile_bounds
from fxstream.tiling.segment import Segment

__all__ = ["Grid"]

LARGEST_DENOMINATOR = 32
"""Outputs of several resolutions are cut at fractions with at most this denominator, where these fit."""
MOST_AWAY = 8
"""So many pixels from its end may such a fraction lead; the last tile owns them."""


class Grid:
    """The search for the fewest even tiles along one axis whose reads stay below the bound."""

    def __init__(self, segment: Segment, request: Request, axis: int) -> None:
        self.axis = axis
        self._walk = BoundsPass(segment, axis)
        self._extents = [segment.graph[output].extents[axis] for output in segment.outputs]
        self.finest = max(self._extents)
        """The number of tiles of one output pixel each."""
        self.fullest = min(self._extents)
        """The largest number of tiles of which each owns a pixel of every output."""
        self._cuts = [_ratio(extent, self.finest) for extent in self._extents]
        self._bounds = {
            name: tile_bounds(segment.graph, request, segment.input_extents(name))[axis]
            for name, _ in segment.spatial
        }

    def even(self, count: int) -> int:
        """How many tiles a grid of `count` really has, when all but the last are equally long."""
        return -(-self.finest // -(-self.finest // count))

    def _owned(self, count: int, i: int) -> tuple[Interval, ...]:
        return self.owned(-(-self.finest // count), i)

    def owned(self, length: int, i: int) -> tuple[Interval, ...]:
        """The intervals that tile `i` owns, where each has `length` pixels of the finest output."""
        return self._between(i * length, min((i + 1) * length, self.finest))

    def _between(self, start: int, stop: int) -> tuple[Interval, ...]:
        """The pixels of each output that belong to these of the finest."""
        cuts = zip(self._extents, self._cuts, strict=True)
        return tuple(Interval(_cut(start, e, self.finest, r), _cut(stop, e, self.finest, r)) for e, r in cuts)

    def tiles_of(self, length: int) -> AxisTiles:
        """The tiles of `length` pixels of the finest output, the last one shorter."""
        count = -(-self.finest // length)
        return AxisTiles(self._walk, functools.partial(self.owned, length), count, self._period(length))

    def _period(self, length: int) -> tuple[int, list[Ratio]] | None:
        """After how many tiles, away from borders, boxes repeat, and how far each moves per tile, if ever."""
        ratios, owns_nothing = self._ratios, any(num * length < den for num, den in self._cuts)
        if ratios is None or owns_nothing:
            return None
        repeats = math.lcm(*(den for _, den in ratios))
        return repeats // math.gcd(repeats, length), [(num * length, den) for num, den in ratios]

    @functools.cached_property
    def _ratios(self) -> list[Ratio] | None:
        """How many pixels each node's box moves by per pixel of the finest output."""
        return self._walk.ratios(self._cuts)

    def uniform(self, length: int) -> UniformTiles | None:
        """Tiles with boxes of one shape, of which those inside own `length` pixels of the finest output.

        At borders, where they need no halo, they own more. None where there are none, or where they read too much.
        """
        moves = self._moves
        if moves is None or self._period(length) is None:
            return None
        before, after = self._halo(length, moves)
        count = -(-(self.finest - before - after) // length)
        if count < 2:
            return None
        owned = functools.partial(self._starting_late, length, before, count)
        tiles = UniformTiles(AxisTiles(self._walk, owned, count, self._period(length)), self._walk, moves, length)
        fits = all(tiles.largest(name) <= bound for name, bound in self._bounds.items())
        return tiles if fits and tiles.is_possible else None

    def fewest_uniform(self, count: int, tried: int = 1) -> UniformTiles | None:
        """The smallest such tiles, in a grid of `count`, or of the first of so many more that is possible."""
        return next(filter(None, map(self._uniform_in, range(count, count + tried))), None)

    def _uniform_in(self, count: int) -> UniformTiles | None:
        even = -(-self.finest // count)
        if self._moves is None or self._period(even) is None:
            return None
        halo = sum(self._halo(even, self._moves))
        return self.uniform(max(1, -(-(self.finest - halo) // count)))

    @functools.cached_property
    def _moves(self) -> Moves | None:
        """How boxes move along with what tiles own; None where they do not all move by whole pixels."""
        if self._ratios is None:
            return None
        whole = self._walk.tile(self._between(0, self.finest))
        return Moves.of(whole, dict(zip(self._walk.names, self._ratios, strict=True)))

    def _halo(self, length: int, moves: Moves) -> tuple[int, int]:
        """Pixels of the finest output by which the boxes of tiles of this length begin earlier, and end later."""
        tiles, halo = self.tiles_of(length), (0, 0)
        for i in tiles.places:
            rooms, stop = moves.room(tiles[i]), min((i + 1) * length, self.finest)
            halo = (
                max(halo[0], i * length - moves.unit * rooms[0]),
                max(halo[1], self.finest - stop - moves.unit * rooms[1]),
            )
        return halo

    def _starting_late(self, length: int, more: int, count: int, i: int) -> tuple[Interval, ...]:
        """What tile `i` owns where the first owns more than `length`, and the last what is left."""
        start, stop = i * length + more, (i + 1) * length + more
        return self._between(start if i else 0, stop if i < count - 1 else self.finest)

    def is_like(self, other: Grid) -> bool:
        """Whether both axes have the same tiles."""
        return self._extents == other._extents and self._walk.is_like(other._walk)

    def inner(self, count: int) -> dict[str, int]:
        """How many pixels the middle tile of a grid of `count` holds of each node and spatial input."""
        return self._walk.lengths(self._owned(count, self.even(count) // 2), {})[0]

    def excess(self, outputs: tuple[Interval, ...]) -> tuple[int, str] | None:
        """The input that exceeds its bound most for this tile, after the pixels it needs; None if all fit."""
        lengths, _ = self._walk.lengths(outputs, {})
        over = [(lengths[name], name) for name, bound in self._bounds.items() if lengths.get(name, 0) > bound]
        return max(over) if over else None

    def _fits(self, count: int, sampled: bool = False) -> bool:
        tiles = self.tiles(count)
        places = (0, 1, len(tiles) // 2, len(tiles) - 2, len(tiles) - 1) if sampled else tiles.places
        every = {i for i in places if 0 <= i < len(tiles)}
        return all(self.excess(self._owned(count, i)) is None for i in every)

    def count(self) -> int | None:
        """The smallest number of tiles that fits, or None where single pixels do not fit."""
        low, high = 0, 1
        while not self._fits(high, sampled=True):
            if high == self.finest:
                return None
            low, high = high, min(2 * high, self.finest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(middle, sampled=True) else (middle, high)
        return next((count for count in range(high, self.finest + 1) if self._fits(count)), None)

    def longest(
        self, count: int, watched: Mapping[int, Sequence[str]]
    ) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        """About the longest intervals, as of `BoundsPass.lengths`, over a few tiles of a grid of `count`."""
        last = self.even(count) - 1
        lengths: dict[str, int] = {}
        reads: dict[int, dict[str, int]] = {index: {} for index in watched}
        for i in {0, (last + 1) // 2, last}:
            of_tile, after = self._walk.lengths(self._owned(count, i), watched)
            _keep_longest(lengths, of_tile)
            for index, longest in reads.items():
                _keep_longest(longest, after[index])
        return lengths, reads

    def tiles(self, count: int) -> AxisTiles:
        """The tiles of a grid of `count`."""
        return self.tiles_of(-(-self.finest // count))

    def least(self) -> tuple[int, str, int]:
        """The largest read of a single output pixel: pixels, input, and the bound it exceeds."""
        pixels = (self.owned(1, i) for i in self.tiles_of(1).places)
        worst = max(filter(None, map(self.excess, pixels)))
        return (*worst, self._bounds[worst[1]])


def _ratio(extent: int, finest: int) -> Ratio:
    """The pixels of an output per pixel of the finest: the simplest fraction that leads about as far."""
    most = min(MOST_AWAY, extent / LARGEST_DENOMINATOR)
    for den in range(1, LARGEST_DENOMINATOR + 1):
        num = round(extent * den / finest)
        if num and abs(num * finest / den - extent) <= most:
            return num // math.gcd(num, den), den // math.gcd(num, den)
    return Fraction(extent, finest).as_integer_ratio()


def _cut(pixel: int, extent: int, finest: int, ratio: Ratio) -> int:
    """Where an output is cut that the finest is cut at `pixel`."""
    return extent if pixel == finest else min(pixel * ratio[0] // ratio[1], extent)


def _keep_longest(longest: dict[str, int], other: Mapping[str, int]) -> None:
    for name, length in other.items():
        longest[name] = max(longest.get(name, 0), length)
