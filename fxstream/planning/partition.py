"""Where a streamed region is cut into segments.

A dynamic program over the places of a region where few bytes are live (one tensor between two residual blocks,
the features so far inside a dense block). It minimises

    seconds of all tiles / seconds of the plain region  +  bytes of the boundaries / bytes of the activations

which trades time against kept memory, both relative to the plain network; seconds are those of `cost`. Boundaries
may also be given, as a number of segments or as the modules that each end one.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.errors import PlanError
from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.typed_graph import TypedGraph
from fxstream.planning.estimate import CostContext
from fxstream.planning.part_costs import PartCosts
from fxstream.tiling.grid import Grid
from fxstream.tiling.parts import stages_of_outputs
from fxstream.tiling.request import Request, belongs, last_node_of, tile_bounds
from fxstream.tiling.segment import Segment, make_segment

__all__ = ["FEW_PASSES", "Places", "RegionPlanner"]

MOST_CANDIDATES = 24
"""Boundaries considered per region; their pairs are what planning time goes into."""
FEW_PASSES = 6
"""A stretch of more passes is considered only where nothing else fits into the memory."""
SEGMENT_COST = 0.01
"""What one more segment must save, as a share of the plain network's seconds or activations."""


class Places:
    """The places of a region where it may be cut: place `i` is behind its node `i`."""

    def __init__(self, graph: TypedGraph, nodes: tuple[str, ...]) -> None:
        self._graph, self._nodes = graph, nodes
        self._place = {name: i for i, name in enumerate(nodes)}
        self._reads = [[read.value.name for read in graph.pattern(name).reads] for name in nodes]
        self._last_read = list(range(len(nodes)))
        for i, reads in enumerate(self._reads):
            for name in reads:
                if name in self._place:
                    self._last_read[self._place[name]] = i
        self._is_output = [graph.is_output(name, self._place) for name in nodes]

    def behind(self, paths: Sequence[str]) -> list[int]:
        """The places behind these modules of the user, in order. Raises `PlanError` for one that does not run."""
        ends = set()
        for path in paths:
            last_node_of(self._graph, path)
            inside = [i for i, n in enumerate(self._nodes) if belongs(self._module(n), path)]
            ends |= {inside[-1]} if inside else set()
        return sorted(ends)

    def _module(self, name: str) -> str:
        verdict = self._graph[name].verdict
        return verdict.module if verdict is not None else ""

    def runs(self, ends: Sequence[int]) -> list[tuple[str, ...]]:
        """The nodes between these places."""
        cuts = [0, *(end + 1 for end in ends if end + 1 < len(self._nodes)), len(self._nodes)]
        return [self._nodes[a:b] for a, b in itertools.pairwise(cuts) if a < b]

    def run(self, start: int, end: int) -> Segment:
        """The stretch behind one place up to another, as its last pass: without reductions that maps follow."""
        whole = make_segment(self._graph, "", self._nodes[start + 1 : end + 1])
        maps = tuple(name for name in whole.outputs if not self._is_reduction(self._place[name]))
        return replace(whole, outputs=maps or whole.outputs[-1:])

    def live(self) -> list[list[str]]:
        """For the place behind each node, the values of the region computed so far that are still needed."""
        live: list[list[int]] = [[]]
        for i in range(len(self._nodes)):
            live.append([k for k in (*live[-1], i) if self._last_read[k] > i])
        return [[self._nodes[k] for k in places] for places in live[1:]]

    def candidates(self, most: int) -> dict[int, int]:
        """The places worth a boundary and the bytes that it would keep, at most so many of them.

        These are the places before a window or behind a reduction where no fewer bytes are live just before or
        after; of each of `most` equal stretches of the region the one with the fewest bytes.
        """
        live = self.live()[:-1]
        sizes = [self._graph.activation_bytes(names) for names in live]
        places = {}
        for i, (names, size) in enumerate(zip(live, sizes, strict=True)):
            single = not any(self._graph[name].is_tuple for name in names)
            after = sizes[i + 1] if i + 1 < len(sizes) else size
            fits = self._is_window(i + 1) or self._is_reduction(i)
            lowest = size <= sizes[max(i - 1, 0)] and (size < after or (size == after and fits))
            if names and single and lowest:
                places[i] = size
        best: dict[int, int] = {}
        for i, size in places.items():
            stretch = i * most // len(self._nodes)
            if stretch not in best or size < places[best[stretch]]:
                best[stretch] = i
        return {i: places[i] for i in best.values()}

    @property
    def reductions(self) -> int:
        """The number of reductions, behind each of which a boundary saves a pass."""
        return sum(map(self._is_reduction, range(len(self._nodes))))

    def _is_reduction(self, place: int) -> bool:
        return self._graph[self._nodes[place]].reduces

    def stages(self, start: int, end: int) -> list[int]:
        """The stages of the outputs of the stretch behind one place up to another: each takes a pass."""
        stretch = range(start + 1, end + 1)
        outputs = [self._nodes[i] for i in stretch if self._is_output[i] or self._last_read[i] > end]
        return stages_of_outputs(self._graph, outputs)

    def starts(self, end: int, places: Sequence[int], most_passes: int) -> list[int]:
        """Those of the places before `end` behind which a stretch of few enough passes begins."""
        before = [start for start in places if start < end]
        close = [start for start in before if len(self.stages(start, end)) <= most_passes]
        return close or before[-1:]

    def _is_window(self, place: int) -> bool:
        """Whether the node at `place` reads more than its own pixels."""
        reads = self._graph.pattern(self._nodes[place]).reads
        return any(axis_map != IDENTITY for read in reads for axis_map in read.maps)


class RegionPlanner:
    """The dynamic program over the places where a region may be cut into segments."""

    def __init__(self, context: CostContext, nodes: tuple[str, ...], request: Request) -> None:
        graph = context.graph
        self._graph = graph
        self._nodes = nodes
        self._request = request
        self._places = Places(graph, nodes)
        self._place = {name: i for i, name in enumerate(nodes)}
        self._costs = PartCosts(context, nodes)
        self._bytes = max(1, graph.activation_bytes(nodes))
        self._reads = [[(r.value.name, r.dims) for r in graph.pattern(n).reads] for n in nodes]
        plain = context.dense(nodes).part()
        self._seconds = sum(map(float, plain.seconds(torch.ones(len(nodes), dtype=torch.float64)))) or 1.0
        """Those of the plain region; nothing but views takes none."""
        self._extents = torch.tensor([graph[name].extents for name in nodes], dtype=torch.float64)
        self._stages = torch.tensor([graph[name].stage for name in nodes])
        self._boundary_bytes: dict[int, int] = {}
        self._bounds: _Leaves = {}

    def segments(self) -> list[tuple[str, ...]]:
        """The runs of nodes, in order, that become segments."""
        if isinstance(self._request.segments, tuple):
            return self._places.runs(self._places.behind(self._request.segments))
        return self._places.runs(self._chosen())

    def _chosen(self) -> list[int]:
        """The ends of all segments but the last, by the objective in the module's docstring.

        Where the tile is too small for the few candidates, all places are considered; where it is too small for
        any choice, the one that needs the smallest tile is returned, so that the error can name it.
        """
        count = self._request.segments
        assert not isinstance(count, tuple)
        usual = MOST_CANDIDATES + self._places.reductions
        for most in (usual, 2 * usual, len(self._nodes)):
            self._boundary_bytes = self._places.candidates(most)
            pairs = self._pairs()
            cheapest = _path(pairs, count, lambda cost: cost.total, operator.add)
            if cheapest is not None or len(self._boundary_bytes) < most // 2:
                break
        if cheapest is None:
            cheapest = _path(pairs, count, lambda cost: cost.least_tile, max)
        if cheapest is None:
            raise PlanError(f"segments={count}: this stream can be cut into 1 to {len(pairs)} segments")
        return cheapest[:-1]

    def _pairs(self) -> dict[int, dict[int, _Cost]]:
        """The cost of every segment, by its end and then by the end of the segment before it."""
        ends = [*self._boundary_bytes, len(self._nodes) - 1]
        most_passes = FEW_PASSES if self._request.segments is None else len(self._nodes)
        return {end: self._ending_at(end, self._places.starts(end, [-1, *ends], most_passes)) for end in ends}

    def _ending_at(self, end: int, starts: Sequence[int]) -> dict[int, _Cost]:
        """The cost of the segment from each start to `end`, in the coarsest grid that fits it."""
        first = min(starts) + 1
        run = self._places.run(first - 1, end)
        leaves = {start: self._leaves(start, end) for start in starts}
        watched = {start - first: tuple(found) for start, found in leaves.items()}
        chosen: dict[int, list[_Choice | None]] = {start: [] for start in starts}
        least = dict.fromkeys(starts, 1.0)
        for axis in range(run.axes):
            grid = Grid(run, self._request, axis)
            _, reads = grid.longest(grid.finest, watched)
            for start in starts:
                for leaf, (_, scales) in leaves[start].items():
                    least[start] = max(least[start], reads[start - first].get(leaf, 0) * scales[axis])
            pending = {start for start in starts if _fits(reads[start - first], leaves[start], axis)}
            found: dict[int, _Choice] = {}
            for count in _counts(grid.finest):
                if not pending:
                    break
                lengths, reads = grid.longest(count, {start - first: watched[start - first] for start in pending})
                fitting = {start for start in pending if _fits(reads[start - first], leaves[start], axis)}
                found |= dict.fromkeys(fitting, (len(grid.outputs(count)), lengths))
                pending -= fitting
            for start in starts:
                chosen[start].append(found.get(start))
        return {start: self._cost(start, end, chosen[start], least[start]) for start in starts}

    def _leaves(self, start: int, end: int) -> _Leaves:
        """What a segment between two places reads from outside: bounds, and image pixels per pixel."""
        found: _Leaves = {}
        for name, dims in itertools.chain(*self._reads[start + 1 : end + 1]):
            if self._place.get(name, -1) <= start and name not in found:
                found[name] = self._bound(name, dims)
        return found

    def _bound(self, name: str, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        if name not in self._bounds:
            extents = tuple(self._graph.value(name).shape[d] for d in dims)
            full = self._graph.image_extents(len(dims))
            scales = tuple(image / extent for image, extent in zip(full, extents, strict=True))
            self._bounds[name] = (tile_bounds(self._graph, self._request, extents), scales)
        return self._bounds[name]

    def _cost(self, start: int, end: int, chosen: Sequence[_Choice | None], least: float) -> _Cost:
        found = [choice for choice in chosen if choice is not None]
        if len(found) < len(chosen):
            return _Cost(math.inf, least)
        lengths = [[held.get(name, 0) for _, held in found] for name in self._nodes]
        shares = (torch.tensor(lengths, dtype=torch.float64) / self._extents).prod(-1)
        seconds = math.prod(count for count, _ in found) * sum(
            self._both(start + 1, end + 1, shares * self._up_to(stage), again=True)
            for stage in self._places.stages(start, end)
        )
        boundary = self._boundary_bytes.get(end, 0) / self._bytes
        return _Cost(seconds / self._seconds + boundary + SEGMENT_COST, least)

    def _up_to(self, stage: int) -> torch.Tensor:
        """Ones for the nodes that a pass of this stage may run, zeros for the others."""
        return (self._stages <= stage).double()

    def _both(self, start: int, stop: int, shares: torch.Tensor, again: bool = False) -> float:
        """Seconds of a forward and a backward of one tile, of two forwards if the first is done `again`."""
        forward, backward = map(float, self._costs.part(start, stop).seconds(self._costs.shares(shares)))
        return forward * (1 + again) + backward


_Choice = tuple[int, dict[str, int]]
"""A number of tiles along an axis, and the longest interval that a tile then holds of each node."""
_Leaves = dict[str, tuple[tuple[int, ...], tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of one segment: its share of the objective, and the smallest tile that it can run with."""

    total: float
    least_tile: float


def _fits(reads: Mapping[str, int], leaves: _Leaves, axis: int) -> bool:
    """Whether what a tile reads of each leaf is within the leaf's bound."""
    return all(reads.get(leaf, 0) <= bounds[axis] for leaf, (bounds, _) in leaves.items())


def _counts(finest: int) -> list[int]:
    """Numbers of tiles to consider: all small ones, then in steps of about a quarter, and the finest."""
    counts, count = [], 1
    while count < finest:
        counts.append(count)
        count = max(count + 1, count * 5 // 4)
    return [*counts, finest]


def _path(
    pairs: Mapping[int, Mapping[int, _Cost]],
    count: int | None,
    weight: Callable[[_Cost], float],
    combine: Callable[[float, float], float],
) -> list[int] | None:
    """The segment ends of the cheapest way from -1 to the last end, in `count` steps if given."""
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(-1, 0): (0.0, [])}
    for end, starts in pairs.items():
        for steps in range(1, (count or 1) + 1):
            before = steps - 1 if count else 1
            options = []
            for start, cost in starts.items():
                known = best.get((start, 0 if start == -1 else before))
                if known and not (count and start == -1 and steps > 1) and weight(cost) < math.inf:
                    options.append((combine(known[0], weight(cost)), [*known[1], end]))
            if options:
                best[end, steps] = min(options)
    found = best.get((max(pairs), count or 1))
    return found[1] if found else None
