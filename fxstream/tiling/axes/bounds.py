"""Bounds inference: what a tile of a segment must read, boxes propagated backwards through the graph in integers.

A tile owns an interval of every output along each axis; walking the nodes backwards, the interval that a node must
hold is the hull of what its consumers read, clipped to the node's real extent. This is exact for any graph of
branches, concatenations, strides and upsamplings. Axes are independent, so the walk is per axis and a tile is a
product of walks.

Coordinates: every interval is in pixels of the node that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from fxstream.geometry.box import EMPTY, Interval
from fxstream.rules import Border, Read
from fxstream.rules.access import Lookup
from fxstream.tiling.segment import Segment

__all__ = ["AxisStep", "AxisTile", "BoundsPass", "Crop", "CropPad", "Ratio", "lookups"]

Ratio = tuple[int, int]
"""A fraction in lowest terms."""


@dataclass(frozen=True, slots=True)
class Crop:
    """`length` pixels from `start` on, of the `full` pixels that a tile holds of a value."""

    start: int
    length: int
    full: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut away."""
        return self.length == self.full


@dataclass(frozen=True, slots=True)
class CropPad:
    """How one read is served along one axis: a crop of what the producer holds, then padding."""

    crop: Crop
    before: int
    after: int

    @property
    def pads(self) -> int:
        """Pixels that are padded on both sides together."""
        return self.before + self.after

    @property
    def length(self) -> int:
        """Pixels with the padding."""
        return self.crop.length + self.pads


@dataclass(frozen=True, slots=True)
class AxisStep:
    """One node of a tile along one axis: its reads, the crop of its result, the divisors of an average.

    `lookup`, what it takes from a table, is an input of the tile program and not part of it.
    """

    reads: tuple[CropPad, ...]
    result: Crop
    counts: tuple[int, ...] | None
    lookup: Lookup | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class AxisTile:
    """One tile along one axis, which owns `outputs`.

    `steps` and `crops` (of the outputs) depend only on lengths and relative positions, so that tiles with
    equal ones run the same program; `boxes` are absolute. `yields` is what that program makes of each output,
    where that is more than the tile owns.
    """

    outputs: tuple[Interval, ...]
    boxes: Mapping[str, Interval]
    steps: tuple[AxisStep | None, ...]
    crops: tuple[Crop, ...]
    yields: tuple[Interval, ...] | None = None

    @property
    def program_key(self) -> tuple[object, ...]:
        """What the tile program depends on along this axis."""
        return self.steps, self.crops

    @property
    def looks_up(self) -> bool:
        """Whether an operator takes something from a table, which differs from place to place."""
        return any(step is not None and step.lookup is not None for step in self.steps)

    def sides(self, k: int) -> tuple[int, int]:
        """The pixels before and after what it owns of an output that its program makes."""
        if self.yields is None:
            return 0, 0
        made, owned = self.yields[k], self.outputs[k]
        return owned.start - made.start, made.stop - owned.stop

    def at(self, outputs: tuple[Interval, ...], moved: Mapping[str, int]) -> AxisTile:
        """The tile that owns these intervals and runs the same program; boxes lie so much further on."""
        boxes = {n: Interval(box.start + moved[n], box.stop + moved[n]) for n, box in self.boxes.items()}
        return AxisTile(outputs, boxes, self.steps, self.crops)


class BoundsPass:
    """The backward walk of one segment along one axis."""

    def __init__(self, segment: Segment, axis: int) -> None:
        self.segment = segment
        self.axis = axis
        graph = segment.graph
        self._patterns = tuple(graph.pattern(name) for name in segment.nodes)
        self.names = (*segment.nodes, *(name for name, _ in segment.spatial))
        self._index = index = {name: i for i, name in enumerate(self.names)}
        # Plain integers: this loop runs for every node of every tile that the planner considers.
        self._steps = tuple(
            (i, tuple(_integers(index, read, axis) for read in pattern.reads))
            for i, pattern in reversed(tuple(enumerate(self._patterns)))
        )
        self._items = tuple(
            (i, index[pattern.reads[0].value.name]) for i, pattern in enumerate(self._patterns) if pattern.is_item
        )
        self._outputs = tuple(index[name] for name in segment.outputs)

    def is_like(self, other: BoundsPass) -> bool:
        """Whether both walks find the same lengths for the same outputs, as along two axes of a square image."""
        return self._steps == other._steps and self._outputs == other._outputs

    def boxes(self, outputs: Sequence[Interval]) -> dict[str, Interval]:
        """The interval that each node and spatial input must hold, for the interval owned of each output."""
        starts, stops, _ = self._walk(outputs)
        return {
            name: Interval(start, stop)
            for name, start, stop in zip(self.names, starts, stops, strict=True)
            if stop > start
        }

    def lengths(
        self, outputs: Sequence[Interval], watched: Mapping[int, Sequence[str]]
    ) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        """How many pixels of each node and spatial input a tile must hold; the same walk as `boxes`.

        For each index in `watched` also what the nodes after that index alone need of the values named there:
        the reads of a segment that starts after it.
        """
        reads: dict[int, dict[str, int]] = {}
        starts, stops, _ = self._walk(outputs, watched, reads)
        return {n: b - a for n, a, b in zip(self.names, starts, stops, strict=True) if b > a}, reads

    def measured(self, outputs: Sequence[Interval]) -> tuple[list[int], bool]:
        """The same lengths, in the order of `names`, and whether anything is read outside of the image."""
        starts, stops, is_outside = self._walk(outputs)
        return [stop - start for start, stop in zip(starts, stops, strict=True)], is_outside

    def ratios(self, outputs: Sequence[Ratio]) -> list[Ratio] | None:
        """How many pixels each node's box moves by where the outputs' move by these, as fractions.

        None where two operators that read the same value move by different fractions: its boxes do not repeat.
        """
        moved: list[Ratio | None] = [None] * len(self.names)
        for i, ratio in zip(self._outputs, outputs, strict=True):
            if moved[i] not in (None, ratio):
                return None
            moved[i] = ratio
        for i, reads in self._steps:
            of_node = moved[i]
            if of_node is None:
                continue
            for producer, num, den, *_ in reads:
                common = math.gcd(of_node[0] * num, of_node[1] * den)
                ratio = (of_node[0] * num // common, of_node[1] * den // common)
                if moved[producer] not in (None, ratio):
                    return None
                moved[producer] = ratio
        return [ratio or (0, 1) for ratio in moved]

    def _walk(
        self,
        outputs: Sequence[Interval],
        watched: Mapping[int, Sequence[str]] = MappingProxyType({}),
        reads_after: dict[int, dict[str, int]] | None = None,
    ) -> tuple[list[int], list[int], bool]:
        """`Read.needed`, `Interval.nearest` and `Interval.hull`, node by node, in plain integers.

        With whether anything is read outside of the image.
        """
        starts, stops, is_outside = [0] * len(self.names), [0] * len(self.names), False
        for i, owned in zip(self._outputs, outputs, strict=True):
            starts[i], stops[i] = owned.start, owned.stop
        index, after = self._index, {} if reads_after is None else reads_after
        for i, reads in self._steps:
            if i in watched:
                after[i] = {name: stops[index[name]] - starts[index[name]] for name in watched[i]}
            start, stop = starts[i], stops[i]
            if start == stop:
                continue
            for producer, num, den, first, last, extent, border in reads:
                low = (num * start + first) // den
                high = (num * (stop - 1) + last) // den + 1
                if low < 0 or high > extent:
                    is_outside = True
                    if border is not Border.FILLED:
                        low, high = border.reflected(low, high, extent)
                    low = 0 if low < 0 else extent - 1 if low >= extent else low
                    high = 1 if high < 1 else extent if high > extent else high
                if starts[producer] == stops[producer]:
                    starts[producer], stops[producer] = low, high
                else:
                    starts[producer] = min(starts[producer], low)
                    stops[producer] = max(stops[producer], high)
        after |= {-1: {name: stops[index[name]] - starts[index[name]] for name in watched.get(-1, ())}}
        for item, several in self._items:
            starts[item], stops[item] = starts[several], stops[several]
        return starts, stops, is_outside

    def tile(self, outputs: tuple[Interval, ...]) -> AxisTile:
        """Everything about the tile that owns these intervals, one per output of the segment."""
        boxes = self.boxes(outputs)
        steps = tuple(self.step(i, boxes) for i in range(len(self._patterns)))
        crops = tuple(
            Crop(out.start - boxes[name].start, len(out), len(boxes[name])) if len(out) else Crop(0, 0, 0)
            for name, out in zip(self.segment.outputs, outputs, strict=True)
        )
        return AxisTile(outputs, boxes, steps, crops)

    def step(
        self, i: int, boxes: Mapping[str, Interval], less: Mapping[str, int] = MappingProxyType({})
    ) -> AxisStep | None:
        """How a node is evaluated from the boxes its producers hold; None where nothing needs it.

        With `less`, in an image in which each value has so many pixels less.
        """
        pattern, box = self._patterns[i], boxes.get(self.names[i], EMPTY)
        if not len(box):
            return None
        reads, counts, produced, lookup = [], None, box, None
        for read in pattern.reads:
            missing = less.get(read.value.name, 0)
            needed = boxes[read.value.name] if pattern.is_item else read.needed(self.axis, box, missing)
            reads.append(_served(needed, boxes[read.value.name], read.extents[self.axis] - missing))
            counts = pattern.counts(self.axis, box, missing)
            produced = pattern.produced(self.axis, needed, box)
            lookup = pattern.lookup(self.axis, box, needed)
        crop = Crop(box.start - produced.start, len(box), len(produced))
        return AxisStep(tuple(reads), crop, counts, lookup)


def _served(needed: Interval, box: Interval, extent: int) -> CropPad:
    """How a read of `needed` pixels, of an image of `extent` pixels, is served where the producer holds `box`."""
    real = needed.clip(extent)
    start = real.start - box.start if len(real) else 0
    return CropPad(Crop(start, len(real), len(box)), *needed.outside(extent))


def _integers(index: Mapping[str, int], read: Read, axis: int) -> tuple[int, int, int, int, int, int, Border]:
    axis_map, value = read.maps[axis], read.value
    numbers = axis_map.num, axis_map.den, axis_map.first, axis_map.last
    return (index[value.name], *numbers, value.shape[read.dims[axis]], read.border)


def lookups(segment: Segment, tiles: Sequence[AxisTile]) -> dict[tuple[str, int], Lookup]:
    """What a tile takes from tables, by node and axis, in the order in which its program is given them."""
    tables: dict[tuple[str, int], Lookup] = {}
    for index, name in enumerate(segment.nodes):
        steps = [tile.steps[index] for tile in tiles]
        if None not in steps:
            tables |= {(name, k): step.lookup for k, step in enumerate(steps) if step and step.lookup}
    return tables
