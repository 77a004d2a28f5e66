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
from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Locality
from fxstream.tiling.bounds import AxisTile, Segment, is_read_outside
from fxstream.tiling.grid import Grid
from fxstream.tiling.request import Request, image_extents, leaf_extents, output_extents

__all__ = ["SegmentPlan", "arithmetic", "offloadable", "plan_segment", "plan_whole", "tile_arithmetic"]


@dataclass(frozen=True, slots=True, repr=False)
class SegmentPlan:
    """A segment and its tiles: along each axis, and every combination of them; without axes it runs whole.

    The graphs of the last `kept` tiles are kept from forward to backward, the others are recomputed. `first` and
    `last` are the module paths where it begins and ends.
    """

    segment: Segment
    axes: tuple[tuple[AxisTile, ...], ...]
    arithmetic: int
    streamed_arithmetic: float
    overlap: float
    first: str
    last: str
    kept: int = 0

    @property
    def overhead(self) -> float:
        """Arithmetic of all tiles over that of the plain segment, in one forward pass."""
        return self.streamed_arithmetic / max(1, self.arithmetic)

    @property
    def tile_count(self) -> int:
        """Number of tiles."""
        return math.prod(len(tiles) for tiles in self.axes)

    def tiles(self) -> Iterator[tuple[AxisTile, ...]]:
        """The tiles in the order in which they run."""
        return itertools.product(*self.axes)

    def largest(self, node: str) -> tuple[int, ...]:
        """The longest interval that a tile holds of a node or leaf, along each axis."""
        return tuple(max(len(tile.boxes.get(node, EMPTY)) for tile in tiles) for tiles in self.axes)

    def __str__(self) -> str:
        name = f"{self.segment.name}: {self.first} .. {self.last} ({len(self.segment.nodes)} nodes)"
        if not self.axes:
            return f"{name}, whole, {'kept' if self.kept else 'recomputed'}"
        grid = " x ".join(str(len(tiles)) for tiles in self.axes)
        leaf, others = self.segment.leaves[0][0], len(self.segment.leaves) - 1
        reads = f"{'x'.join(map(str, self.largest(leaf)))} of `{leaf}`"
        reads += f" and {others} more" if others else ""
        kept = f", {self.kept} of them kept" if self.kept else ""
        cost = f"overlap {self.overlap:.0%}, {self.overhead:.2f}x MACs"
        return f"{name}, {grid} tiles{kept}, largest read {reads}, {cost}"

    __repr__ = __str__


def plan_whole(locality: Locality, segment: Segment) -> SegmentPlan:
    """The plan of a segment that runs whole."""
    plain = sum(arithmetic(locality, name) for name in segment.nodes)
    return SegmentPlan(segment, (), plain, plain, 0.0, *_ends(locality, segment))


def _ends(locality: Locality, segment: Segment) -> tuple[str, str]:
    first, last = (locality.verdicts[segment.nodes[i]] for i in (0, -1))
    return first.module or first.node, last.module or last.node


def plan_segment(
    locality: Locality, segment: Segment, request: Request, counts: Sequence[int] | None = None
) -> SegmentPlan:
    """The tiles of one segment: so many along each axis, or the fewest whose reads the request allows.

    Raises `PlanError` where no tile fits, naming the smallest that does and the node that needs it.
    """
    axes = len(locality.footprint(segment.outputs[0]).dims)
    grids = [Grid(locality, segment, request, axis) for axis in range(axes)]
    tiles = []
    for grid, count in zip(grids, [grid.count() for grid in grids] if counts is None else counts, strict=True):
        if count is None:
            raise _too_small(locality, segment, request, grid)
        tiles.append(grid.tiles(count))
    costs = {name: arithmetic(locality, name) for name in segment.nodes}
    streamed = sum(plain * _repeated(tiles, name, output_extents(locality, name)) for name, plain in costs.items())
    overlap = max(
        1 - 1 / max(1.0, _repeated(tiles, leaf, leaf_extents(locality, leaf, dims)))
        for leaf, dims in segment.leaves
        if locality.value(leaf).image or len(segment.leaves) == 1
    )
    ends = _ends(locality, segment)
    return SegmentPlan(segment, tuple(tiles), sum(costs.values()), streamed, overlap, *ends)


def offloadable(locality: Locality, plans: Sequence[SegmentPlan]) -> frozenset[str]:
    """The maps that only tiles write and only tiles read, which need not lie where they are computed.

    A segment computes where its small tensors are, so one that has none keeps its leaves there too.
    """
    tiled = [plan.segment for plan in plans if plan.axes]
    inside = {name for segment in tiled for name in segment.nodes}
    read = Counter(leaf for segment in tiled if segment.smalls for leaf, _ in segment.leaves)
    every = Counter(name for plan in plans for name in plan.segment.inputs)
    made = (output for segment in tiled for output in segment.outputs)
    passed = (name for name in made if read[name] == every[name] > 0)
    return frozenset(name for name in passed if not is_read_outside(locality, name, inside))


def arithmetic(locality: Locality, name: str) -> int:
    """Arithmetic of a node at full size: multiply-accumulates, and one per element written."""
    verdict, meta = locality.verdicts[name], locality.metas[name]
    macs = verdict.footprint.macs if verdict.footprint is not None else 0
    return macs + (meta.elements if isinstance(meta, Shape) else 0)


def tile_arithmetic(locality: Locality, plan: SegmentPlan) -> list[float]:
    """Arithmetic of each tile, in the order in which they run."""
    nodes = plan.segment.nodes
    work = torch.tensor([float(arithmetic(locality, name)) for name in nodes], dtype=torch.float64)
    for axis, tiles in enumerate(plan.axes):
        extents = [output_extents(locality, name)[axis] for name in nodes]
        held = [
            [len(tile.boxes.get(n, EMPTY)) / extent for n, extent in zip(nodes, extents, strict=True)]
            for tile in tiles
        ]
        work = work.unsqueeze(-2) * torch.tensor(held, dtype=torch.float64)
    return work.sum(-1).flatten().tolist()  # type: ignore[no-any-return]


def _repeated(axes: Sequence[Sequence[AxisTile]], name: str, extents: Sequence[int]) -> float:
    """How often the pixels of a node or leaf are held, on average over its pixels."""
    return math.prod(
        sum(len(tile.boxes.get(name, ())) for tile in tiles) / extent
        for tiles, extent in zip(axes, extents, strict=True)
    )


def _too_small(locality: Locality, segment: Segment, request: Request, grid: Grid) -> PlanError:
    """The five parts of the error on a tile that one output pixel does not fit in."""
    pixels, leaf, bound = grid.least()
    verdict = locality.verdicts[segment.outputs[-1]]
    dims = dict(segment.leaves)[leaf]
    extent = leaf_extents(locality, leaf, dims)[grid.axis]
    full = image_extents(locality, len(dims))[grid.axis]
    least = (pixels - 1) * full // extent + 1
    where = f" ({verdict.source})" if verdict.source else ""
    message = (
        f"tile={request.tile} is too small along axis {grid.axis}: one output pixel of"
        f" `{verdict.module or verdict.node}`{where} reads {pixels} pixels of `{leaf}`, and this tile holds"
        f" {bound}. The smallest tile that works here is {least}; more segments, or a cut before"
        f" `{verdict.module or verdict.node}`, need less."
    )
    return PlanError(message, least)
