"""The grids that are tried for a span, and what a tile of each holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxstream.tiling.axes.grid import Grid
from fxstream.tiling.request import Request
from fxstream.tiling.segment import Segment

__all__ = ["Grids", "counts_up_to", "grids_of"]

RATIO = 1.3
"""Ratio of one number of tiles along an axis that is tried to the next."""


def counts_up_to(most: int, ratio: float) -> Iterator[int]:
    """Numbers of tiles to try: all small ones, then each about `ratio` times the one before.

    >>> list(counts_up_to(20, 1.5))
    [1, 2, 3, 4, 6, 9, 13, 19]
    """
    count = 1
    while count <= most:
        yield count
        count = max(count + 1, int(count * ratio))


@dataclass(frozen=True, slots=True)
class Grids:
    """Grids of one segment: tiles along each axis `counts`, in all `tiles` [grids], and `shares` [grids, nodes].

    Shares are the parts of the pixels of each node that an inner tile holds.
    """

    counts: list[tuple[int, ...]]
    tiles: torch.Tensor
    shares: torch.Tensor


def grids_of(segment: Segment, nodes: Sequence[str], extents: torch.Tensor) -> Grids:
    """Grids of all sizes of a segment; shares are those of `nodes`, whose extents [nodes, axes] are given."""
    axes = [_Axis(Grid(segment, Request(None), k), nodes, extents[:, k], {}) for k in range(segment.axes)]
    # Axes with the same tiles, as those of a square image, share what is computed of one.
    axes = [next(other for other in axes if other.grid.is_like(axis.grid)) for axis in axes]
    finest = max(axis.grid.fullest for axis in axes)
    shares: dict[tuple[int, ...], torch.Tensor] = {}
    for tried in _numbers(finest, len(axes)):
        counts = tuple(axis.count(number, finest) for axis, number in zip(axes, tried, strict=True))
        if counts not in shares:
            along = [axis.shares(count) for axis, count in zip(axes, counts, strict=True)]
            shares[counts] = torch.stack(along).prod(0)
    tiles = torch.tensor([math.prod(counts) for counts in shares], dtype=torch.float64)
    return Grids(list(shares), tiles, torch.stack(list(shares.values())))


def _numbers(finest: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Numbers of tiles along each axis to try: equal along all, and one fewer step along the last."""
    yield (1,) * axes
    for before, count in itertools.pairwise(counts_up_to(finest, RATIO)):
        if axes > 1:
            yield (*[count] * (axes - 1), before)
        yield (count,) * axes


@dataclass(frozen=True, slots=True)
class _Axis:
    """The grids along one axis, and the shares that were computed by number of tiles."""

    grid: Grid
    nodes: Sequence[str]
    extents: torch.Tensor
    computed: dict[int, torch.Tensor]

    def count(self, number: int, finest: int) -> int:
        """The number of tiles that a grid really has where the longest axis gets `number` of at most `finest`."""
        return self.grid.even(-(-number * self.grid.fullest // finest))

    def shares(self, count: int) -> torch.Tensor:
        """The parts of the lengths of all nodes that the middle one of so many tiles holds."""
        if count not in self.computed:
            lengths = self.grid.inner(count)
            pixels = torch.tensor([lengths.get(name, 0) for name in self.nodes], dtype=torch.float64)
            self.computed[count] = pixels / self.extents
        return self.computed[count]
