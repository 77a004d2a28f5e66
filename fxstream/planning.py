"""The plan for one image size: what is streamed, in which segments and tiles.

A region is streamed when that frees most of its activations, or when the user names segments or a cut. Where it
is cut is decided in `boundaries`, the tiles of each segment in `grid`.

Reference: Pinckaers, van Ginneken, Litjens, "Streaming convolutional neural networks for end-to-end learning
with multi-megapixel images", sections III-A and III-C.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxstream.boundaries import RegionPlanner, arithmetic
from fxstream.box import EMPTY, Box
from fxstream.demand import AxisTile, Segment, make_segment
from fxstream.errors import PlanError
from fxstream.grid import Grid
from fxstream.locality import Locality
from fxstream.request import Request, image_extents, leaf_extents, output_extents, place_of_module
from fxstream.rules import Kind

__all__ = ["Plan", "SegmentPlan", "make_plan", "streamable_share", "total_bytes", "worthwhile"]

WORTHWHILE = 0.5
"""A region is streamed when that frees more than this share of its activations."""
LEAST_SHARE = 0.01
"""A region with less than this share of the network's activations is not worth a tile loop."""


@dataclass(frozen=True, slots=True, repr=False)
class SegmentPlan:
    """A segment and its tiles: along each axis, and every combination of them."""

    segment: Segment
    axes: tuple[tuple[AxisTile, ...], ...]
    arithmetic: int
    streamed_arithmetic: float

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

    def leaf_box(self, leaf: str, tile: Sequence[AxisTile]) -> Box:
        """What a tile reads of a leaf, in pixels of the leaf; empty where it owns nothing that needs the leaf."""
        return Box(tuple(along.boxes.get(leaf, EMPTY) for along in tile))

    def largest_read(self, leaf: str) -> tuple[int, ...]:
        """The largest box that a tile reads of a leaf."""
        return tuple(max(len(tile.boxes.get(leaf, EMPTY)) for tile in tiles) for tiles in self.axes)

    def __str__(self) -> str:
        grid = " x ".join(str(len(tiles)) for tiles in self.axes)
        nodes, leaf = self.segment.nodes, self.segment.leaves[0][0]
        others = len(self.segment.leaves) - 1
        reads = f"{'x'.join(map(str, self.largest_read(leaf)))} of `{leaf}`"
        reads += f" and {others} more" if others else ""
        return (
            f"{self.segment.name}: {nodes[0]} .. {nodes[-1]} ({len(nodes)} nodes), {grid} tiles, "
            f"largest read {reads}, {self.overhead:.2f}x MACs"
        )

    __repr__ = __str__


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """The segments to stream, in the order of the graph, and why no more."""

    segments: tuple[SegmentPlan, ...]
    streamed_bytes: int
    activation_bytes: int

    @property
    def streamed_share(self) -> float:
        """Share of the network's activations that lie in streamed segments."""
        return self.streamed_bytes / max(1, self.activation_bytes)

    @property
    def overhead(self) -> float:
        """Arithmetic of all tiles over that of the plain segments, in one forward pass."""
        plain = sum(plan.arithmetic for plan in self.segments)
        return sum(plan.streamed_arithmetic for plan in self.segments) / max(1, plain)

    @property
    def is_trivial(self) -> bool:
        """Whether nothing is cut into tiles, so that the plain path does the same."""
        return all(plan.tile_count == 1 for plan in self.segments)

    def __str__(self) -> str:
        head = (
            f"{len(self.segments)} segments, {self.streamed_share:.0%} of the activations streamed,"
            f" {self.overhead:.2f}x MACs"
        )
        return "\n".join([head, *(f"  {segment}" for segment in self.segments)])

    __repr__ = __str__


def make_plan(locality: Locality, request: Request) -> Plan:
    """The segments and tiles for one image size.

    Raises `PlanError` where no tile fits, naming the smallest that does and the node that needs it, and where
    a module path in the request matches nothing.
    """
    asked = request.segments is not None or request.cut is not None
    parts = _regions_before(locality, request.cut) if asked else worthwhile(locality)
    chosen = [run for part in parts for run in RegionPlanner(locality, part, request).segments()]
    planned = tuple(
        _segment_plan(locality, make_segment(locality, f"segment_{i}", run), request)
        for i, run in enumerate(chosen)
    )
    streamed = locality.activation_bytes([name for run in chosen for name in run])
    return Plan(planned, streamed, total_bytes(locality))


def total_bytes(locality: Locality) -> int:
    """Bytes of all results that depend on an image."""
    return locality.activation_bytes([v.node for v in locality.verdicts.values() if v.kind is not Kind.SMALL])


def worthwhile(locality: Locality) -> list[tuple[str, ...]]:
    """The regions that are streamed without being asked for, by their nodes."""
    total = total_bytes(locality)
    return [region.nodes for region in locality.regions if _is_worthwhile(locality, region.nodes, total)]


def streamable_share(locality: Locality) -> float:
    """The share of the activations that is streamed without being asked for."""
    return sum(map(locality.activation_bytes, worthwhile(locality))) / max(1, total_bytes(locality))


def _regions_before(locality: Locality, cut: str | None) -> list[tuple[str, ...]]:
    """The regions, up to the last node of the module where the user ends the stream."""
    names = [node.name for node in locality.graph.nodes]
    allowed = set(names if cut is None else names[: place_of_module(locality, cut) + 1])
    parts = (tuple(name for name in region.nodes if name in allowed) for region in locality.regions)
    return [part for part in parts if part]


def _is_worthwhile(locality: Locality, nodes: tuple[str, ...], total: int) -> bool:
    """Whether streaming these nodes frees a good part of their activations."""
    held = locality.activation_bytes(nodes)
    kept = locality.activation_bytes(make_segment(locality, "", nodes).outputs)
    return held - kept > WORTHWHILE * held and held > LEAST_SHARE * total


def _segment_plan(locality: Locality, segment: Segment, request: Request) -> SegmentPlan:
    """The grid of one segment, or the error that names what it would need."""
    axes = len(locality.footprint(segment.outputs[0]).dims)
    grids = [Grid(locality, segment, request, axis) for axis in range(axes)]
    counts = [grid.count() for grid in grids]
    tiles = []
    for grid, count in zip(grids, counts, strict=True):
        if count is None:
            raise _too_small(locality, segment, request, grid)
        tiles.append(grid.tiles(count))
    plain = sum(arithmetic(locality, segment.nodes).values())
    return SegmentPlan(segment, tuple(tiles), plain, _streamed_arithmetic(locality, segment, tiles))


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


def _streamed_arithmetic(locality: Locality, segment: Segment, axes: Sequence[Sequence[AxisTile]]) -> float:
    """Arithmetic of all tiles: per node, its arithmetic times how often its pixels are computed."""
    total = 0.0
    for name, plain in arithmetic(locality, segment.nodes).items():
        extents = output_extents(locality, name)
        repeated = (
            sum(len(tile.boxes.get(name, ())) for tile in tiles) / extent
            for tiles, extent in zip(axes, extents, strict=True)
        )
        total += plain * math.prod(repeated)
    return total
