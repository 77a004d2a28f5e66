"""A region whose tiles read no more of the image than the user's tile.

Each span has one option: the coarsest grid that the tile allows. The search minimises

    seconds of all tiles / seconds of the dense region  +  bytes of the boundaries / bytes of the activations

which trades time against kept memory, both relative to the plain network; seconds are those of `cost`. A span that
fits in no grid has infinite cost. Where no cut of the region fits, such spans may run whole, as few bytes of them
as possible, but not the span that reads the image. What a span needs are the pixels of the image of the smallest
tile that it can run with. Of equal ways that with the earliest cuts is taken: so the error on too small a tile
names one operator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.errors import PlanError
from fxstream.planning.estimate import CostContext
from fxstream.planning.partition import FEW_SWEEPS
from fxstream.planning.regions.grids import counts_up_to
from fxstream.planning.regions.region_costs import RegionCosts
from fxstream.planning.search import Option, Search, Span
from fxstream.tiling.axes.grid import Grid
from fxstream.tiling.request import Request, tile_bounds

__all__ = ["TileRegion", "spans_within_tile"]

MOST_CANDIDATES = 24
"""Boundaries considered per region; their pairs are what planning time goes into."""
SEGMENT_COST = 0.01
"""What one more segment must save, as a share of the dense region's seconds or activations."""
WHOLE_COST = 100
"""What it costs to run all of the region whole: so much that nothing is run whole that fits into the tile."""
RATIO = 1.25
"""Ratio of one number of tiles along an axis that is tried to the next."""


def spans_within_tile(context: CostContext, nodes: tuple[str, ...], request: Request) -> list[Span]:
    """The spans of a region that become segments, in order; one that needs more than the tile runs whole.

    Where the tile is too small for the few usual candidates, all positions are considered; where it is too small
    for the first operators, or for as many segments as are asked for, the choice that needs the smallest tile is
    returned, so that the error can name it. Raises `PlanError` where the region cannot be cut into so many.
    """
    costs = RegionCosts(context, nodes)
    positions, count = costs.positions, request.segments
    if isinstance(count, tuple):
        return [Span(span) for span in positions.between(positions.after(count))]
    usual = MOST_CANDIDATES + positions.reductions
    for most in (usual, 2 * usual, len(nodes)):
        region = TileRegion(costs, request, positions.candidates(most))
        search = Search([region], count=count, exact=True) if count else Search([region])
        cheapest = search.fastest(math.inf)
        if cheapest is not None or len(region.ends) <= most // 2:
            break
    if cheapest is None and count is None:
        boundaries = positions.candidates(most) | positions.first_window()
        region = TileRegion(costs, request, dict(sorted(boundaries.items())), may_be_whole=True)
        search = Search([region])
        cheapest = search.fastest(math.inf)
    chosen = cheapest or search.smallest()
    if chosen is None:
        raise PlanError(f"segments={count}: this stream can be cut into 1 to {len(region.ends)} segments")
    return list(chosen.spans)


@dataclass(frozen=True, slots=True)
class _Input:
    """A value that a span reads: along each axis, pixels that a tile may read, and image pixels per pixel."""

    bounds: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Along:
    """A span along one axis: the smallest tile that it can run with, and the coarsest grid that fits.

    A tile of that grid, which has `count` tiles, holds at most `lengths` of each node; 0 where no grid fits.
    """

    least_tile: float
    count: int
    lengths: Mapping[str, int]


class TileRegion:
    """A region that may be cut at the positions in `boundaries`, each with the bytes of the boundary there.

    With `may_be_whole` spans run whole where they need more than the tile, but not the one that reads the image.
    """

    def __init__(
        self, costs: RegionCosts, request: Request, boundaries: Mapping[int, int], may_be_whole: bool = False
    ) -> None:
        self._costs, self._request, self._boundaries = costs, request, boundaries
        self._may_be_whole = may_be_whole
        self.ends = [*boundaries, len(costs.nodes) - 1]
        self._most_sweeps = FEW_SWEEPS if request.segments is None else len(costs.nodes)
        self._bytes = max(1, costs.graph.activation_bytes(costs.nodes))
        self._seconds = costs.dense_seconds or 1.0
        """Nothing but views takes none."""
        self._inputs: dict[str, _Input] = {}
        self._along: dict[int, dict[int, list[_Along]]] = {}

    def starts(self, end: int) -> list[int]:
        """The positions where a span up to `end` may start."""
        return self._costs.positions.starts(end, self.ends, self._most_sweeps)

    def options(self, start: int, end: int) -> list[list[Option]]:
        """The span in the coarsest grid that fits."""
        if end not in self._along:
            self._along[end] = self._along_axes(end)
        along, span = self._along[end][start], Span(self._costs.span(start, end))
        cost = self._cost(start, end, along) if all(axis.count for axis in along) else math.inf
        tiled = Option(span, max(axis.least_tile for axis in along), 0.0, cost, rank=(end,))
        if cost < math.inf or not self._may_be_whole or (start < 0 and self._reads_image):
            return [[tiled]]
        return [[Option(replace(span, counts=()), 0.0, 0.0, self._cost_whole(start, end), rank=(end,))]]

    def weights(self, start: int, end: int) -> float:
        """Nothing: weights are not tiled."""
        return 0.0

    def largest(self, start: int, end: int) -> str:
        """The node of a span with the largest result."""
        return self._costs.largest(start, end)

    @property
    def _reads_image(self) -> bool:
        """Whether the region is that which begins with the image."""
        graph, first = self._costs.graph, self._costs.nodes[0]
        return any(image.name in graph[first].inputs for image in graph.images)

    def _cost_whole(self, start: int, end: int) -> float:
        """The share in the objective of a span that runs whole."""
        size = self._costs.graph.activation_bytes(self._costs.span(start, end))
        return (WHOLE_COST * size + self._boundaries.get(end, 0)) / self._bytes + SEGMENT_COST

    def _along_axes(self, end: int) -> dict[int, list[_Along]]:
        """For each start the span from there to `end` along every axis. One walk serves all starts."""
        starts = self.starts(end)
        first = min(starts) + 1
        sweep = self._costs.positions.last_sweep(first - 1, end)
        inputs = {start - first: self._inputs_of(start, end) for start in starts}
        axes = [_along(Grid(sweep, self._request, axis), inputs) for axis in range(sweep.axes)]
        return {start: [spans[start - first] for spans in axes] for start in starts}

    def _inputs_of(self, start: int, end: int) -> dict[str, _Input]:
        """What a span reads from outside."""
        inputs: dict[str, _Input] = {}
        for name in self._costs.span(start, end):
            for read in self._costs.graph.pattern(name).reads:
                outside = self._costs.index.get(read.value.name, -1) <= start
                if outside and read.value.name not in inputs:
                    inputs[read.value.name] = self._input(read.value.name, read.dims)
        return inputs

    def _input(self, name: str, dims: tuple[int, ...]) -> _Input:
        if name not in self._inputs:
            graph = self._costs.graph
            extents = tuple(graph.value(name).shape[d] for d in dims)
            full = graph.image_extents(extents)
            scales = tuple(image / extent for image, extent in zip(full, extents, strict=True))
            self._inputs[name] = _Input(tile_bounds(graph, self._request, extents), scales)
        return self._inputs[name]

    def _cost(self, start: int, end: int, along: Sequence[_Along]) -> float:
        """The share of a span in the objective."""
        lengths = [[axis.lengths.get(name, 0) for axis in along] for name in self._costs.nodes]
        shares = (torch.tensor(lengths, dtype=torch.float64) / self._costs.extents).prod(-1)
        sweeps = self._costs.streamed(start, end).seconds_of_sweeps(shares)
        tiles, tile_seconds = math.prod(axis.count for axis in along), sum(float(2 * a + b) for a, b in sweeps)
        boundary = self._boundaries.get(end, 0) / self._bytes
        return tiles * tile_seconds / self._seconds + boundary + SEGMENT_COST


def _along(grid: Grid, inputs: Mapping[int, Mapping[str, _Input]]) -> dict[int, _Along]:
    """Spans along one axis, by the index of the node before each in the segment that the grid is of."""
    watched = {index: tuple(of_span) for index, of_span in inputs.items()}
    _, reads = grid.longest(grid.finest, watched)
    spans = {
        index: _Along(_least_tile(reads[index], of_span, grid.axis), 0, {}) for index, of_span in inputs.items()
    }
    pending = {index for index in inputs if _fits(reads[index], inputs[index], grid.axis)}
    for count in itertools.chain(counts_up_to(grid.finest - 1, RATIO), [grid.finest]):
        if not pending:
            break
        lengths, reads = grid.longest(count, {index: watched[index] for index in pending})
        for index in [one for one in pending if _fits(reads[one], inputs[one], grid.axis)]:
            spans[index] = _Along(spans[index].least_tile, grid.even(count), lengths)
            pending.remove(index)
    return spans


def _least_tile(reads: Mapping[str, int], inputs: Mapping[str, _Input], axis: int) -> float:
    """The pixels of the image that a tile reads which reads so much of each input."""
    return max([1.0, *(reads.get(name, 0) * one.scales[axis] for name, one in inputs.items())])


def _fits(reads: Mapping[str, int], inputs: Mapping[str, _Input], axis: int) -> bool:
    """Whether what a tile reads of each input is within its bound."""
    return all(reads.get(name, 0) <= one.bounds[axis] for name, one in inputs.items())
