"""The tiles of one segment: the grid along each axis, and what they cost together."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fxstream.errors import PlanError
from fxstream.geometry.box import EMPTY
from fxstream.graph.typed_graph import TypedGraph
from fxstream.tiling.axes.axis_tiles import AxisTiles
from fxstream.tiling.axes.bounds import AxisTile
from fxstream.tiling.axes.grid import Grid
from fxstream.tiling.axes.uniform_tiles import UniformTiles, may_be_uniform
from fxstream.tiling.request import Request
from fxstream.tiling.segment import Segment

__all__ = ["SegmentPlan", "offloadable", "plan_lengths", "plan_segment", "plan_whole", "tile_arithmetic"]

Tiles = AxisTiles | UniformTiles
MOST_EXTRA = 1 / 8
"""Tiles are uniform where that takes at most this share of arithmetic more."""
MOST_TRIED = 4
"""Uniform tiles within the user's tile may need more tiles: so many numbers are tried along an axis."""


@dataclass(frozen=True, slots=True, repr=False)
class SegmentPlan:
    """A segment and its tiles: along each axis, and every combination of them; without axes it runs whole.

    The autograd graphs of the last `kept` tiles are saved from forward to backward, the others are recomputed.
    The recomputation of what runs whole may be streamed in `parts`, which are segments of the segment's graph. A
    part that `skips` its forward is one of whose results nothing but the gradient is asked for.
    """

    segment: Segment
    axes: tuple[Tiles, ...]
    arithmetic: int
    streamed_arithmetic: float
    overlap: float
    kept: int = 0
    parts: tuple[SegmentPlan, ...] = ()
    skips: bool = False

    @property
    def overhead(self) -> float:
        """Arithmetic of all tiles over that of the plain segment, in one forward pass."""
        return self.streamed_arithmetic / max(1, self.arithmetic)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The pixels of the finest output that a tile has along each axis."""
        return tuple(tiles.length for tiles in self.axes)

    @property
    def is_uniform(self) -> bool:
        """Whether tiles have boxes of one shape."""
        return any(isinstance(tiles, UniformTiles) for tiles in self.axes)

    @property
    def tile_count(self) -> int:
        """Number of tiles."""
        return math.prod(len(tiles) for tiles in self.axes)

    def tiles(self) -> Iterator[tuple[AxisTile, ...]]:
        """The tiles in the order in which they run."""
        return itertools.product(*self.axes)

    def largest(self, name: str) -> tuple[int, ...]:
        """The longest interval that a tile holds of a node or spatial input, along each axis."""
        return tuple(tiles.largest(name) for tiles in self.axes)

    def usual(self, name: str) -> tuple[float, ...]:
        """The pixels that a tile holds of a node or spatial input along each axis, on average."""
        return tuple(tiles.total(name) / len(tiles) for tiles in self.axes)

    def __str__(self) -> str:
        first, last = self.segment.ends
        name = f"{self.segment.name}: {first} .. {last} ({len(self.segment.covers)} nodes)"
        if not self.axes:
            parts = f" in {len(self.parts)} parts" if self.parts else ""
            return f"{name}, whole, {'kept' if self.kept else f'recomputed{parts}'}"
        grid = " x ".join(str(len(tiles)) for tiles in self.axes)
        main, others = self.segment.spatial[0][0], len(self.segment.spatial) - 1
        reads = f"{'x'.join(map(str, self.largest(main)))} of `{main}`"
        reads += f" and {others} more" if others else ""
        grid += " uniform" if self.is_uniform else ""
        kept = f", {self.kept} of them kept" if self.kept else ""
        cost = f"overlap {self.overlap:.0%}, {self.overhead:.2f}x MACs"
        return f"{name}, {grid} tiles{kept}, largest read {reads}, {cost}"

    __repr__ = __str__


def plan_whole(segment: Segment, parts: tuple[SegmentPlan, ...] = ()) -> SegmentPlan:
    """The plan of a segment that runs whole, and is recomputed in parts."""
    plain = sum(segment.graph[name].arithmetic for name in segment.nodes)
    return SegmentPlan(segment, (), plain, plain, 0.0, parts=parts)


def plan_lengths(segment: Segment, lengths: Sequence[int], uniform: bool = False) -> SegmentPlan:
    """The tiles of one segment that have so many pixels of its finest output along each axis.

    Uniform ones may have less, where so many would read much that they do not need.
    """
    grids = [Grid(segment, Request(None), axis) for axis in range(segment.axes)]
    plan = _planned(segment, [grid.tiles_of(min(n, grid.finest)) for grid, n in zip(grids, lengths, strict=True)])
    if not uniform or not _may_be_uniform(plan):
        return plan
    exact = [grid.uniform(n) for grid, n in zip(grids, lengths, strict=True)]
    fewest = [grid.fewest_uniform(len(tiles)) for grid, tiles in zip(grids, plan.axes, strict=True)]
    return _uniform(plan, (exact, fewest))


def plan_segment(segment: Segment, request: Request, counts: Sequence[int] | None = None) -> SegmentPlan:
    """The tiles of one segment: so many along each axis, or the fewest whose reads the request allows.

    Raises `PlanError` where no tile fits, naming the smallest that does and the node that needs it.
    """
    grids = [Grid(segment, request, axis) for axis in range(segment.axes)]
    counted = []
    for grid, count in zip(grids, [grid.count() for grid in grids] if counts is None else counts, strict=True):
        if count is None:
            raise _too_small(segment, request, grid)
        counted.append((grid, count))
    plan = _planned(segment, [grid.tiles(count) for grid, count in counted])
    if not request.compile_tiles or not _may_be_uniform(plan):
        return plan
    tried = 1 if counts is not None else MOST_TRIED
    return _uniform(plan, ([grid.fewest_uniform(count, tried) for grid, count in counted],))


def _may_be_uniform(plan: SegmentPlan) -> bool:
    """Whether there are several tiles, which may compute pixels that they do not need."""
    return plan.tile_count > 1 and may_be_uniform(plan.segment)


def _uniform(plan: SegmentPlan, every: Sequence[Sequence[UniformTiles | None]]) -> SegmentPlan:
    """The plan in uniform tiles, the first of these along its axes that are possible and cost little more."""
    for along in every:
        pairs = zip(along, plan.axes, strict=True)
        tiles = [uniform if len(ordinary) > 1 else ordinary for uniform, ordinary in pairs]
        possible = [one for one in tiles if one is not None]
        if len(possible) == len(tiles):
            made = _planned(plan.segment, possible)
            if made.streamed_arithmetic <= (1 + MOST_EXTRA) * plan.streamed_arithmetic:
                return made
    return plan


def _planned(segment: Segment, tiles: Sequence[Tiles]) -> SegmentPlan:
    """The plan of these tiles, with what they compute and read."""
    nodes = [segment.graph[name] for name in segment.nodes]
    streamed = sum(node.arithmetic * _repeated(tiles, node.name, node.extents) for node in nodes)
    overlap = max(
        1 - 1 / max(1.0, _repeated(tiles, name, segment.input_extents(name)))
        for name, _ in segment.spatial
        if segment.graph.value(name).image or len(segment.spatial) == 1
    )
    return SegmentPlan(segment, tuple(tiles), sum(node.arithmetic for node in nodes), streamed, overlap)


def offloadable(graph: TypedGraph, plans: Sequence[SegmentPlan]) -> frozenset[str]:
    """The maps that only tiles write and only tiles read, which need not lie where they are computed.

    A segment computes where its whole inputs are, so one that has none keeps its spatial inputs there too.
    """
    tiled = [plan.segment for plan in plans if plan.axes]
    inside = {name for segment in tiled for name in segment.covers}
    read = Counter(name for segment in tiled if segment.whole for name, _ in segment.spatial)
    every = Counter(name for plan in plans for name in plan.segment.inputs)
    made = (output for segment in tiled for output in segment.outputs)
    passed = (name for name in made if read[name] == every[name] > 0)
    return frozenset(name for name in passed if not graph.is_read_outside(name, inside))


def tile_arithmetic(plan: SegmentPlan) -> list[float]:
    """Arithmetic of each tile, in the order in which they run."""
    nodes = [plan.segment.graph[name] for name in plan.segment.nodes]
    work = torch.tensor([float(node.arithmetic) for node in nodes], dtype=torch.float64)
    for axis, tiles in enumerate(plan.axes):
        shares = [[len(tile.boxes.get(n.name, EMPTY)) / n.extents[axis] for n in nodes] for tile in tiles]
        work = work.unsqueeze(-2) * torch.tensor(shares, dtype=torch.float64)
    return work.sum(-1).flatten().tolist()  # type: ignore[no-any-return]


def _repeated(axes: Sequence[Tiles], name: str, extents: Sequence[int]) -> float:
    """How often the pixels of a node or input are held, on average over its pixels."""
    return math.prod(tiles.total(name) / extent for tiles, extent in zip(axes, extents, strict=True))


def _too_small(segment: Segment, request: Request, grid: Grid) -> PlanError:
    """The five parts of the error on a tile that one output pixel does not fit in."""
    pixels, name, bound = grid.least()
    verdict = segment.graph[segment.outputs[-1]].verdict
    assert verdict is not None
    extents = segment.input_extents(name)
    full = segment.graph.image_extents(extents)[grid.axis]
    least = (pixels - 1) * full // extents[grid.axis] + 1
    where = f" ({verdict.source})" if verdict.source else ""
    message = (
        f"tile={request.tile} is too small along axis {grid.axis}: one output pixel of `{verdict.place}`{where}"
        f" reads {pixels} pixels of `{name}`, and this tile holds {bound}. The smallest tile that works here is"
        f" {least}; more segments, or a cut before `{verdict.place}`, need less."
    )
    return PlanError(message, least)
