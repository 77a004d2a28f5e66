"""What a tile of a segment must read: boxes propagated backwards through the graph, in integers.

A `Segment` is a run of local nodes with its inputs and outputs. A tile owns an interval of every output along
each axis; walking the nodes backwards, the interval that a node must hold is the hull of what its consumers
read, clipped to the node's real extent. This is exact for any graph of branches, concatenations, strides and
upsamplings. Axes are independent, so the walk is per axis and a tile is a product of walks.

Coordinates: every interval is in pixels of the node that it belongs to.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from fxstream.geometry.box import EMPTY, Interval
from fxstream.geometry.receptive_field import AxisMap
from fxstream.graph.typed_graph import Locality
from fxstream.rules import Average, Border, Production
from fxstream.rules.resample_table import Lookup, Resample

__all__ = [
    "AxisStep",
    "AxisTile",
    "AxisWalk",
    "Cut",
    "ReadStep",
    "Segment",
    "is_output",
    "is_read_outside",
    "lookups",
    "make_segment",
]


@dataclass(frozen=True, slots=True)
class Segment:
    """Local nodes that are evaluated tile by tile, and reductions of their results that end there.

    `leaves` are the spatial inputs with their stream dims (cut to a box per tile), `smalls` the inputs passed
    whole, `outputs` the nodes used outside, all by node name. A tile owns a box of each output, of a reduction
    a box of the positions that it reduces.
    """

    name: str
    nodes: tuple[str, ...]
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    smalls: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Leaves and small tensors, in the order in which a segment is given them."""
        return (*(leaf for leaf, _ in self.leaves), *self.smalls)


def make_segment(
    locality: Locality, name: str, nodes: tuple[str, ...], outputs: Collection[str] | None = None
) -> Segment:
    """The segment of these nodes, its inputs and outputs found from the graph.

    With `outputs` it has these, and of the nodes only those that they need.
    """
    if outputs is not None:
        nodes = _needed(locality, nodes, outputs)
    inside = set(nodes)
    leaves: dict[str, tuple[int, ...]] = {}
    smalls: dict[str, None] = {}
    ends: list[str] = []
    for node in locality.graph.nodes:
        if node.name not in inside:
            continue
        reads = {read.value.name: read.dims for read in locality.footprint(node.name).reads}
        leaves.update({n: dims for n, dims in reads.items() if n not in inside})
        for given in node.all_input_nodes:
            is_integer = isinstance(locality.metas.get(given.name), int)
            if given.name not in inside and given.name not in reads and not is_integer:
                smalls[given.name] = None
        if node.name in outputs if outputs is not None else is_output(locality, node.name, inside):
            ends.append(node.name)
    return Segment(name, nodes, tuple(leaves.items()), tuple(smalls), tuple(ends))


def is_read_outside(locality: Locality, name: str, inside: Collection[str]) -> bool:
    """Whether anything but the nodes `inside`, and integers, reads a node's result."""
    users = (u.name for u in locality.nodes[name].users if u.name not in locality.unread)
    return any(user not in inside and not isinstance(locality.metas.get(user), int) for user in users)


def is_output(locality: Locality, name: str, inside: Collection[str]) -> bool:
    """Whether a segment of the nodes `inside` yields a result: what is read outside, and every reduction.

    What reads the result of a reduction reads it from outside, since it needs that of all tiles.
    """
    reduces = locality.verdicts[name].reduction is not None
    return is_read_outside(locality, name, () if reduces else inside)


def _needed(locality: Locality, nodes: tuple[str, ...], outputs: Collection[str]) -> tuple[str, ...]:
    """Those of the nodes that the outputs depend on, in order; items bring the results that they are of along."""
    needed = set(outputs)
    for name in reversed(nodes):
        if name in needed:
            needed |= {read.value.name for read in locality.footprint(name).reads}
    return tuple(name for name in nodes if name in needed)


@dataclass(frozen=True, slots=True)
class Cut:
    """`length` pixels from `start` on, of the `held` pixels that a tile holds of a value."""

    start: int
    length: int
    held: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut away."""
        return self.length == self.held


@dataclass(frozen=True, slots=True)
class ReadStep:
    """How one read is served along one axis: a cut of what the producer holds, then padding."""

    cut: Cut
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class AxisStep:
    """One node of a tile along one axis: its reads, the cut of its result, the divisors of an average.

    `lookup`, what it takes from a table, is an input of the tile program and no part of it.
    """

    reads: tuple[ReadStep, ...]
    result: Cut
    counts: tuple[int, ...] | None
    lookup: Lookup | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class AxisTile:
    """One tile along one axis.

    `steps` and `crops` (of the outputs) depend only on lengths and relative positions, so that tiles with
    equal ones run the same program; `boxes` are absolute.
    """

    outputs: tuple[Interval, ...]
    boxes: Mapping[str, Interval]
    steps: tuple[AxisStep | None, ...]
    crops: tuple[Cut, ...]

    @property
    def program_key(self) -> tuple[object, ...]:
        """What the tile program depends on along this axis."""
        return self.steps, self.crops


@dataclass(frozen=True, slots=True)
class _Read:
    producer: str
    map: AxisMap
    extent: int
    border: Border

    def needed(self, out: Interval) -> Interval:
        """What `Read.needed` says along this axis."""
        return self.border.needed(self.map.read(out), self.extent)


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    reads: tuple[_Read, ...]
    production: Production | None
    average: Average | None
    resample: Resample | None
    is_item: bool


class AxisWalk:
    """The backward walk of one segment along one axis."""

    def __init__(self, locality: Locality, segment: Segment, axis: int) -> None:
        self.segment = segment
        self.axis = axis
        self._nodes = tuple(_node(locality, name, axis) for name in segment.nodes)
        self._names = (*segment.nodes, *(leaf for leaf, _ in segment.leaves))
        self._place = place = {name: i for i, name in enumerate(self._names)}
        # Plain integers: this loop runs for every node of every tile that the planner considers.
        self._steps = tuple(
            (i, tuple((place[r.producer], *_integers(r.map), r.extent, r.border) for r in node.reads))
            for i, node in reversed(tuple(enumerate(self._nodes)))
        )
        self._items = tuple((i, place[n.reads[0].producer]) for i, n in enumerate(self._nodes) if n.is_item)
        self._outputs = tuple(place[name] for name in segment.outputs)

    def is_like(self, other: AxisWalk) -> bool:
        """Whether both walks find the same lengths for the same outputs, as along two axes of a square image."""
        return self._steps == other._steps and self._outputs == other._outputs

    def boxes(self, outputs: Sequence[Interval]) -> dict[str, Interval]:
        """The interval that each node and leaf must hold, for the interval owned of each output."""
        starts, stops = self._walk(outputs)
        return {
            name: Interval(start, stop)
            for name, start, stop in zip(self._names, starts, stops, strict=True)
            if stop > start
        }

    def lengths(
        self, outputs: Sequence[Interval], watched: Mapping[int, Sequence[str]]
    ) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        """How many pixels of each node and leaf a tile must hold; the same walk as `boxes`.

        For each place in `watched` also what the nodes behind that place alone need of the values named there:
        the reads of a segment that starts behind it.
        """
        reads: dict[int, dict[str, int]] = {}
        starts, stops = self._walk(outputs, watched, reads)
        return {n: b - a for n, a, b in zip(self._names, starts, stops, strict=True) if b > a}, reads

    def _walk(
        self,
        outputs: Sequence[Interval],
        watched: Mapping[int, Sequence[str]] = MappingProxyType({}),
        reads_behind: dict[int, dict[str, int]] | None = None,
    ) -> tuple[list[int], list[int]]:
        """`Read.needed`, `Interval.nearest` and `Interval.hull`, node by node, in plain integers."""
        starts, stops = [0] * len(self._names), [0] * len(self._names)
        for i, owned in zip(self._outputs, outputs, strict=True):
            starts[i], stops[i] = owned.start, owned.stop
        place, found = self._place, {} if reads_behind is None else reads_behind
        for i, reads in self._steps:
            if i in watched:
                found[i] = {name: stops[place[name]] - starts[place[name]] for name in watched[i]}
            start, stop = starts[i], stops[i]
            if start == stop:
                continue
            for producer, num, den, first, last, extent, border in reads:
                low = (num * start + first) // den
                high = (num * (stop - 1) + last) // den + 1
                if border is not Border.FILLED and (low < 0 or high > extent):
                    low, high = border.reflected(low, high, extent)
                low = 0 if low < 0 else extent - 1 if low >= extent else low
                high = 1 if high < 1 else extent if high > extent else high
                if starts[producer] == stops[producer]:
                    starts[producer], stops[producer] = low, high
                else:
                    starts[producer] = min(starts[producer], low)
                    stops[producer] = max(stops[producer], high)
        found |= {-1: {name: stops[place[name]] - starts[place[name]] for name in watched.get(-1, ())}}
        for item, several in self._items:
            starts[item], stops[item] = starts[several], stops[several]
        return starts, stops

    def tile(self, outputs: tuple[Interval, ...]) -> AxisTile:
        """Everything about the tile that owns these intervals, one per output of the segment."""
        boxes = self.boxes(outputs)
        steps = tuple(_step(node, boxes) for node in self._nodes)
        crops = tuple(
            Cut(out.start - boxes[name].start, len(out), len(boxes[name])) if len(out) else Cut(0, 0, 0)
            for name, out in zip(self.segment.outputs, outputs, strict=True)
        )
        return AxisTile(outputs, boxes, steps, crops)


def _integers(axis_map: AxisMap) -> tuple[int, int, int, int]:
    return axis_map.num, axis_map.den, axis_map.first, axis_map.last


def _node(locality: Locality, name: str, axis: int) -> _Node:
    footprint = locality.footprint(name)
    reads = tuple(_Read(r.value.name, r.maps[axis], r.extents[axis], r.border) for r in footprint.reads)
    production = footprint.production[axis] if footprint.production else None
    average = footprint.average[axis] if footprint.average else None
    resample = footprint.resample[axis] if footprint.resample else None
    return _Node(name, reads, production, average, resample, footprint.target is operator.getitem)


def _step(node: _Node, boxes: Mapping[str, Interval]) -> AxisStep | None:
    """How the node is evaluated from the boxes its producers hold; None where nothing needs it."""
    box = boxes.get(node.name, EMPTY)
    if not len(box):
        return None
    reads, produced, lookup = [], box, None
    for read in node.reads:
        held = boxes[read.producer]
        wanted = held if node.is_item else read.needed(box)
        real = wanted.clip(read.extent)
        start = real.start - held.start if len(real) else 0
        reads.append(ReadStep(Cut(start, len(real), len(held)), *wanted.outside(read.extent)))
        if node.production is not None:
            produced = node.production.produce(wanted)
        if node.resample is not None:
            lookup = Lookup(node.resample, box, wanted)
    counts = node.average.counts(box) if node.average is not None else None
    return AxisStep(tuple(reads), Cut(box.start - produced.start, len(box), len(produced)), counts, lookup)


def lookups(segment: Segment, tiles: Sequence[AxisTile]) -> dict[tuple[str, int], Lookup]:
    """What a tile takes from tables, by node and axis, in the order in which its program is given them."""
    found: dict[tuple[str, int], Lookup] = {}
    for place, name in enumerate(segment.nodes):
        steps = [tile.steps[place] for tile in tiles]
        if None not in steps:
            found |= {(name, k): step.lookup for k, step in enumerate(steps) if step and step.lookup}
    return found
