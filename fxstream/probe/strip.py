"""Thin strips: a part of the graph at the smallest size that shows every claim along one stream axis.

A strip is as long as the largest receptive field, a few strides and NaN surroundings need, and as wide as the
part's operators accept. Its length follows from the claims, so a claim that is too small leaves no valid interior,
which is a mismatch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import BROADCAST, ReceptiveField
from fxstream.graph.fields import ExtentChain, Fields, extent_chains, receptive_fields
from fxstream.graph.typed_graph import TypedGraph
from fxstream.probe.findings import UnprobedError
from fxstream.probe.resized import Extents, batch_dims, extents_at, typed_at
from fxstream.probe.subgraph import Subgraph
from fxstream.tiling.segment import Segment

__all__ = [
    "Strip",
    "make_strip",
    "synthetic_weight",
]

Chains = Mapping[str, Mapping[str, tuple[ExtentChain, ...]]]
"""Per spatial input and node, the extent formulas along each axis."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Extents across the strip, the first that the part accepts."""
PERIODS = (1, 4, 8, 16, 32, 64)
"""The strip's extents agree with the real ones modulo one of these, for networks that need certain sizes."""
MOST_PIXELS = 2**17
"""Up to this size the real extents are tried where no strip is accepted."""
MOST_REFUSALS = 3
"""After so many refused sizes the next period is tried."""


@dataclass(frozen=True, slots=True)
class Strip:
    """A subgraph at the size of a strip along one axis, with the claims that are to be measured.

    `tiles` are the intervals of the main input that hold numbers, one per batch entry; outside them it is NaN.
    Fields are per spatial input. `segment` is typed at the strip's size; `batch` is the dim of each node that has
    the batch entries, without nodes of tables that are the same for all entries.
    """

    part: Subgraph
    axis: int
    segment: Segment
    input_extents: Extents
    fields: Mapping[str, Fields]
    tiles: tuple[Interval, Interval]
    main: str
    weights: Mapping[str, torch.Tensor]
    batch: Mapping[str, int]

    @property
    def graph(self) -> TypedGraph:
        """The typed graph at the strip's size."""
        return self.segment.graph

    @property
    def bytes(self) -> int:
        """About what it takes to run it: values while something reads them, gradients beside them, and weights."""
        values = {name: self.graph[name].bytes for name in (*self.input_extents, *self.part.segment.nodes)}
        last = {one: name for name in self.part.segment.nodes for one in self.graph[name].inputs}
        live, peak = sum(values[name] for name in self.input_extents), 0
        for name in self.part.segment.nodes:
            live += values[name]
            peak = max(peak, live)
            live -= sum(values.get(one, 0) for one in {*self.graph[name].inputs} if last[one] == name)
        weights = sum(weight.nbytes for weight in self.weights.values())
        return 2 * peak + 2 * max(values.values()) + weights

    def extent(self, name: str) -> int:
        """Pixels of a node or input along the axis."""
        return self.graph.value(name).extents[self.axis]

    def fields_of(self, name: str) -> dict[str, tuple[ReceptiveField, ...]]:
        """The fields of a node in each input in which it has one."""
        return {source: fields[name] for source, fields in self.fields.items() if name in fields}

    def unclaimed(self) -> set[str]:
        """The nodes that depend on an input in which they have no field, which NaN may reach at any pixel."""
        nodes: set[str] = set()
        for source, fields in self.fields.items():
            reached = {source}
            for name in self.part.segment.nodes:
                if any(read.value.name in reached for read in self.graph.pattern(name).reads):
                    reached.add(name)
            nodes |= reached - fields.keys()
        return nodes

    def tile_of(self, name: str, tile: Interval) -> Interval:
        """The interval of another input that shows the same part of the image as `tile` of the main one.

        All of one with a single pixel, which every tile reads.
        """
        pixels, main = self.input_extents[name][self.axis], self.input_extents[self.main][self.axis]
        if pixels == 1:
            return Interval(0, 1)
        return Interval(tile.start * pixels // main, tile.stop * pixels // main)


@dataclass(frozen=True, slots=True)
class _Claims:
    """What the rules claim of a subgraph at its real size, along one axis: fields and extents from every input."""

    part: Subgraph
    axis: int
    real: Extents
    main: str
    fields: Mapping[str, Fields]
    chains: Chains

    @classmethod
    def of(cls, part: Subgraph, axis: int) -> _Claims:
        names = [name for name, _ in part.segment.spatial]
        real = {name: part.segment.input_extents(name) for name in names}
        graph, nodes = part.segment.graph, part.segment.nodes
        main = max(real, key=lambda name: (graph.value(name).image, math.prod(real[name])))
        fields = {name: receptive_fields(graph, nodes, name) for name in names}
        chains = {name: extent_chains(graph, nodes, name) for name in names}
        return cls(part, axis, real, main, fields, chains)

    def of_input(self, name: str) -> list[ReceptiveField]:
        """The fields of all nodes in one input, along the axis."""
        return [of[self.axis] for node, of in self.fields[name].items() if node in self.part.segment.nodes]

    def are_all_in(self, fields: Mapping[str, Fields]) -> bool:
        """Whether every node has the fields that it has at its real size.

        At a size at which resolutions do not divide each other, branches of several have none.
        """
        return all(self.fields[name].keys() <= of_input.keys() for name, of_input in fields.items())

    def geometry(self) -> tuple[int, tuple[Interval, Interval], int]:
        """The width of the NaN surroundings, the two tiles, and the least length of a strip that holds them."""
        nodes, graph, axis = self.part.segment.nodes, self.part.segment.graph, self.axis
        of_main = self.of_input(self.main)
        if not of_main:
            raise UnprobedError("no node has a receptive field in its largest input")
        deepest = max(of_main, key=lambda f: (f.stride, f.size))
        stride = max(math.ceil(f.stride) for f in of_main)
        margin = _margin(graph, nodes, self.fields[self.main], axis)
        inside = max(f.size for f in of_main) + 3 * stride + 2
        for name, fields in self.fields.items():
            ratio, of_other = -(-self.real[self.main][axis] // self.real[name][axis]), self.of_input(name)
            if name != self.main and self.real[name][axis] > 1 and of_other:
                margin = max(margin, ratio * _margin(graph, nodes, fields, axis))
                inside = max(inside, ratio * (max(f.size for f in of_other) + 3))
        start = margin + (deepest.lows[0] - margin) % stride
        stop = start + inside
        stop += (deepest.highs[-1] + 1 - stop) % stride
        return margin, (Interval(start, stop), Interval(start + 1, stop - 1)), stop + margin

    def candidates(self, length: int) -> Iterator[Iterator[Extents]]:
        """Extents of all inputs for a strip of this length, in groups of one period."""
        real = self.real[self.main]
        strides = {math.ceil(f.stride) for of in self.fields[self.main].values() for f in of}
        for period in dict.fromkeys((*PERIODS, math.lcm(*strides))):
            yield (self._candidate(length, width, period) for width in WIDTHS)
        if real[self.axis] >= length and math.prod(real) <= MOST_PIXELS:
            yield iter([dict(self.real)])

    def _candidate(self, length: int, width: int, period: int) -> Extents:
        real = self.real[self.main]
        extents = [length if k == self.axis else width for k in range(len(real))]
        fitted = [w + (e - w) % period for w, e in zip(extents, real, strict=True)]
        return self._joined(extents_at(self.real, fitted))

    def _joined(self, extents: Extents) -> Extents:
        """Resize every input that is combined elementwise with a feature map to that map's size."""
        resized, chains = dict(extents), self.chains[self.main]
        for name in self.part.segment.nodes:
            pattern = self.part.segment.graph.pattern(name)
            if not pattern.joins_pixels or name not in chains:
                continue
            result = tuple(_applied(chain, e) for chain, e in zip(chains[name], extents[self.main], strict=True))
            for read in pattern.reads:
                if read.value.name in resized and read.value.name != self.main:
                    pairs = zip(read.maps, result, strict=True)
                    resized[read.value.name] = tuple(1 if axis_map == BROADCAST else e for axis_map, e in pairs)
        return resized

    def expected(self, extents: Extents) -> Extents:
        """What the formulas of the rules expect of every node at these extents of the inputs.

        The most that follows from any input: one with a broadcast axis says nothing of that axis.
        """
        most = dict(extents)
        for source, of_node in self.chains.items():
            for name, per_axis in of_node.items():
                of_input = tuple(_applied(chain, e) for chain, e in zip(per_axis, extents[source], strict=True))
                most[name] = tuple(map(max, of_input, most.get(name, of_input)))
        return most


def make_strip(part: Subgraph, axis: int, weights: Mapping[str, torch.Tensor], whole_windows: bool) -> Strip:
    """The smallest strip along `axis` that shows every claim, and the tiles on it."""
    claims = _Claims.of(part, axis)
    if not part.has_batch(claims.main):
        raise UnprobedError("its images have no batch dim in front")
    strips = _strips(claims, weights, whole_windows)
    first = next(strips, None)
    if first is None:
        raise UnprobedError("its operators refuse images of the size of a strip")
    return next((strip for strip in itertools.chain([first], strips) if claims.are_all_in(strip.fields)), first)


def _strips(claims: _Claims, weights: Mapping[str, torch.Tensor], whole_windows: bool) -> Iterator[Strip]:
    """The narrowest strip of each period, of those whose sizes the part accepts."""
    (margin, tiles, length), part = claims.geometry(), claims.part
    for group in claims.candidates(length):
        refused = 0
        for extents in group:
            if not _all_nodes_read(part.segment, claims.fields, claims.expected(extents), whole_windows):
                continue
            segment = typed_at(part, extents)
            if segment is None:
                refused += 1
                if refused == MOST_REFUSALS:
                    break
                continue
            fields = _fields_at(claims, segment, extents, margin, whole_windows)
            if fields is not None:
                batch = batch_dims(part, segment, extents)
                yield Strip(part, claims.axis, segment, extents, fields, tiles, claims.main, weights, batch)
                break


def _fields_at(
    claims: _Claims, segment: Segment, extents: Extents, margin: int, whole_windows: bool
) -> dict[str, Fields] | None:
    """The fields of all nodes at the size of a strip; None where it does not show every claim."""
    graph, nodes = segment.graph, segment.nodes
    if not all(graph[name].is_local for name in nodes):
        return None
    # A mask carries no NaN, and what has no batch is the same for both entries.
    part = claims.part
    poisoned = [name for name in claims.real if part.type_of(name) == part.dtype and part.has_batch(name)]
    fields = {name: receptive_fields(graph, nodes, name) for name in poisoned}
    if claims.main in fields and _margin(graph, nodes, fields[claims.main], claims.axis) > margin:
        return None  # an operator whose result has a fixed size has another stride here
    of_nodes = {**extents, **{name: graph.value(name).extents for name in nodes}}
    return fields if _all_nodes_read(segment, fields, of_nodes, whole_windows) else None


def _all_nodes_read(segment: Segment, claims: Mapping[str, Fields], extents: Extents, whole_windows: bool) -> bool:
    """Whether every node has pixels at these extents of nodes and inputs, and reads pixels that are not padding.

    A max pooling must see a whole window: torch's gradient of one without a real pixel writes out of bounds.
    """
    nodes = segment.nodes
    if any(min(extents[name], default=1) < 1 for name in nodes if name in extents):
        return False
    for source, fields in claims.items():
        for name in nodes:
            if name in fields and not all(map(_reads_real, fields[name], extents[name], extents[source])):
                return False
    return all(
        extents[read.value.name][k] > (axis_map.last - axis_map.first) // axis_map.den
        for pattern in map(segment.graph.pattern, nodes)
        if whole_windows or pattern.fill == -math.inf
        for read in pattern.reads
        for k, axis_map in enumerate(read.maps)
    )


def _reads_real(field: ReceptiveField, extent: int, extent_in: int) -> bool:
    """Whether some pixel has a receptive field that is not all padding."""
    return any(len(field.read(Interval(o, o + 1)).clip(extent_in)) for o in range(extent))


def _applied(chain: ExtentChain, extent: int) -> int:
    for step in chain:
        extent = step.of(extent)
    return extent


def _margin(graph: TypedGraph, nodes: Sequence[str], fields: Fields, axis: int) -> int:
    """How wide the NaN surroundings must be for no window to straddle them, nor to step over them."""
    widest = 1
    for name in nodes:
        for read in graph.pattern(name).reads:
            if read.value.name in fields:
                axis_map = read.maps[axis]
                span = (
                    (axis_map.last - axis_map.first) // axis_map.den + 1 + math.ceil(axis_map.num / axis_map.den)
                )
                widest = max(widest, math.ceil(span * fields[read.value.name][axis].stride))
    return widest


def synthetic_weight(part: Subgraph, name: str) -> torch.Tensor:
    """A synthetic weight: every element is 1/n of its kernel, so that averages stay averages."""
    shape, dtype = part.whole_shape(name, 2), part.type_of(name)
    fan = math.prod(shape[1:]) if len(shape) > 1 else 1
    return torch.full(shape, 1.0 / fan if dtype.is_floating_point else 0, dtype=dtype)
