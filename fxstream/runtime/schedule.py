"""A segment made ready to run: the programs of its tile classes and the schedule of its tiles.

The schedule may change while it runs: where memory does not suffice for a tile, it is replaced by two that own
half of its outputs each. Any partition of the outputs gives the same results.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxstream.geometry.box import EMPTY, Box, Interval
from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Locality
from fxstream.io.sink import Sink
from fxstream.rules import Footprint
from fxstream.rules.resample_table import Lookup
from fxstream.runtime.ranks import Ranks, assigned
from fxstream.runtime.tile_program import TileProgram, tile_program, whole_program
from fxstream.tiling.autograd_saves import Saved
from fxstream.tiling.bounds import AxisTile, AxisWalk, Segment, lookups
from fxstream.tiling.fold import names_of
from fxstream.tiling.segment_plan import SegmentPlan, tile_arithmetic

__all__ = ["Stream", "Subscript", "TileCall", "Watch", "build_stream"]

Subscript = tuple[slice, ...]
Watch = Callable[[str, int, int], None]
"""Is told what runs, how many of its tiles are done, and of how many."""
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class TileCall:
    """One turn of the loop: which program, what it reads of each leaf, what it owns of each output.

    `positions` are the pixels that it owns of each output, or of what a reduction reduces. `lookups` are the parts
    of tables that the program takes behind its other inputs. `tile` is the tile along each axis; () is everything.
    """

    program: int
    leaves: tuple[Subscript, ...]
    outputs: tuple[Subscript | None, ...]
    positions: tuple[int, ...]
    is_kept: bool = False
    lookups: tuple[Lookup, ...] = ()
    tile: tuple[AxisTile, ...] = ()


class _Schedule:
    """Makes the calls of tiles, and the programs of their classes when the first of each comes."""

    def __init__(
        self, locality: Locality, segment: Segment, saved: Mapping[str, Saved] | None, compile_tiles: bool
    ) -> None:
        self._locality, self._segment, self._saved, self._compile_tiles = locality, segment, saved, compile_tiles
        axes = range(len(locality.footprint(segment.outputs[0]).dims))
        self._walks = [AxisWalk(locality, segment, axis) for axis in axes]
        self._numbers: list[dict[object, int]] = [{} for _ in axes]
        self._known: list[dict[int, tuple[AxisTile, int]]] = [{} for _ in axes]
        self._classes: dict[tuple[int, ...], int] = {}
        self.programs: list[TileProgram] = []

    def call(self, tile: tuple[AxisTile, ...], is_kept: bool = False) -> TileCall:
        """The call of the tile that is the product of these."""
        locality, segment = self._locality, self._segment
        leaves = tuple(
            Box(tuple(along.boxes.get(leaf, EMPTY) for along in tile)).index(dims, _rank(locality, leaf))
            for leaf, dims in segment.leaves
        )
        boxes = [Box(tuple(along.outputs[k] for along in tile)) for k in range(len(segment.outputs))]
        owned = tuple(
            _owned(box, locality.footprint(output), _rank(locality, output))
            for box, output in zip(boxes, segment.outputs, strict=True)
        )
        positions = tuple(math.prod(box.shape) for box in boxes)
        tables = tuple(lookups(segment, tile).values())
        return TileCall(self._program(tile), leaves, owned, positions, is_kept, tables, tile)

    def halves(self, call: TileCall) -> tuple[TileCall, ...]:
        """Two calls that own half of its outputs each, along its longest axis; () of what has one pixel."""
        lengths = [max(map(len, along.outputs)) for along in call.tile]
        if max(lengths, default=1) < 2:
            return ()
        axis = lengths.index(max(lengths))
        middles = [(owned.start + owned.stop + 1) // 2 for owned in call.tile[axis].outputs]
        pairs = list(zip(call.tile[axis].outputs, middles, strict=True))
        first = tuple(Interval(owned.start, middle) for owned, middle in pairs)
        second = tuple(Interval(middle, owned.stop) for owned, middle in pairs)
        walk, parts = self._walks[axis], (first, second)
        return tuple(
            self.call((*call.tile[:axis], walk.tile(part), *call.tile[axis + 1 :]), call.is_kept) for part in parts
        )

    def _program(self, tile: tuple[AxisTile, ...]) -> int:
        """The number of the program of the tile's class."""
        key = tuple(self._class_along(axis, along) for axis, along in enumerate(tile))
        if key not in self._classes:
            program = tile_program(self._locality, self._segment, tile, self._saved)
            self._classes[key] = len(self.programs)
            self.programs.append(program.compiled() if self._compile_tiles else program)
        return self._classes[key]

    def _class_along(self, axis: int, along: AxisTile) -> int:
        """The class of a tile along one axis: equal programs, equal number; known tiles by identity."""
        known = self._known[axis]
        if id(along) not in known:
            numbers = self._numbers[axis]
            known[id(along)] = along, numbers.setdefault(along.program_key, len(numbers))
        return known[id(along)][1]


@dataclass(slots=True)
class Stream:
    """A segment made ready to run: the programs of its tile classes and the schedule of its tiles.

    `combined` says how the partial results of the outputs that are reductions are combined, by their places.
    `labels` name the leaves and the small tensors, in that order, in the user's words; `sources` are the places of
    the inputs that each output can send a gradient to. `calls` is replaced, and `is_reduced` set, when tiles had
    to be made smaller. `sinks` take outputs of a call without gradients, by their places, instead of a tensor.
    Where `ranks` share the tiles, `planned` are those of each rank and `calls` this one's. `watch` is told of
    every tile. `offloaded` are the places of the outputs that lie in host memory.
    """

    plan: SegmentPlan
    programs: Sequence[TileProgram]
    calls: tuple[TileCall, ...]
    outputs: tuple[Shape, ...]
    combined: Mapping[int, Combine]
    labels: tuple[str, ...]
    sources: tuple[frozenset[int], ...]
    _schedule: _Schedule | None = field(default=None, repr=False)
    is_reduced: bool = False
    sinks: dict[int, Sink] = field(default_factory=dict)
    ranks: Ranks | None = None
    planned: tuple[tuple[TileCall, ...], ...] = ()
    watch: Watch | None = None
    offloaded: frozenset[int] = frozenset()

    @property
    def leaf_count(self) -> int:
        """How many of the inputs are cut into boxes; the rest is passed whole."""
        return len(self.plan.segment.leaves)

    def halves(self, call: TileCall) -> tuple[TileCall, ...]:
        """Two calls in the place of one; none where nothing smaller exists."""
        return self._schedule.halves(call) if self._schedule is not None else ()

    def owned_by_ranks(self, k: int) -> list[list[Subscript]]:
        """What the tiles of each rank own of an output."""
        return [[box for call in calls if (box := call.outputs[k]) is not None] for calls in self.planned]

    def settled(self) -> contextlib.AbstractContextManager[None]:
        """What ranks do apart: behind it all have done it, or all raise."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.settled()

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """What to tell how many tiles of a pass are done; who watches is told its end, whatever it is."""
        watch = self.watch if self.plan.axes else None
        tell = functools.partial(watch or _nobody, f"{self.plan.segment.name} {what}")
        try:
            yield tell
        finally:
            tell(1, 1)

    def tables(self, call: TileCall, device: torch.device) -> list[torch.Tensor]:
        """What one tile takes from tables."""
        return [tensor for lookup in call.lookups for tensor in lookup.tensors(device)]


def _nobody(what: str, done: int, total: int) -> None:
    """Nobody watches."""


def build_stream(
    locality: Locality,
    plan: SegmentPlan,
    labels: tuple[str, ...],
    saved: Mapping[str, Saved] | None = None,
    compile_tiles: bool = False,
    ranks: Ranks | None = None,
) -> Stream:
    """The programs and the schedule of a planned segment; `saved` as in `tile_program`.

    Where `ranks` share the tiles, a segment that runs whole runs on all of them alike.
    """
    segment = plan.segment
    shapes = tuple(_shape(locality, output) for output in segment.outputs)
    sources = _sources(locality, segment)
    if not plan.axes:
        program = whole_program(locality, segment, saved)
        programs = (program.compiled() if compile_tiles else program,)
        return Stream(plan, programs, (_whole_call(plan),), shapes, {}, labels, sources)
    schedule = _Schedule(locality, segment, saved, compile_tiles)
    recomputed = plan.tile_count - plan.kept
    calls = tuple(schedule.call(tile, i >= recomputed) for i, tile in enumerate(plan.tiles()))
    planned = _shared(locality, plan, calls, ranks.count) if ranks is not None else ()
    own = planned[ranks.rank] if ranks is not None else calls
    footprints = [locality.footprint(output) for output in segment.outputs]
    combined = {k: f.reduction.combine for k, f in enumerate(footprints) if f.reduction is not None}
    stream = Stream(plan, schedule.programs, own, shapes, combined, labels, sources, schedule)
    stream.ranks, stream.planned = ranks, planned
    return stream


KEPT = 0.75
"""The time of a tile that is not recomputed over that of one that is."""


def _shared(
    locality: Locality, plan: SegmentPlan, calls: Sequence[TileCall], count: int
) -> tuple[tuple[TileCall, ...], ...]:
    """The tiles of each rank, in order, balanced by their arithmetic."""
    work = tile_arithmetic(locality, plan)
    costs = [cost * (KEPT if call.is_kept else 1) for cost, call in zip(work, calls, strict=True)]
    ranks = assigned(costs, count)
    pairs = list(zip(calls, ranks, strict=True))
    return tuple(tuple(call for call, owner in pairs if owner == rank) for rank in range(count))


def _whole_call(plan: SegmentPlan) -> TileCall:
    """The one call of a segment that runs whole."""
    leaves = ((slice(None),),) * len(plan.segment.leaves)
    outputs = len(plan.segment.outputs)
    return TileCall(0, leaves, ((),) * outputs, (1,) * outputs, plan.kept > 0)


CONSTANT = {"aten::detach", "aten::zeros_like", "aten::ones_like", "aten::full_like"}
"""Operators whose result has no gradient."""


def _sources(locality: Locality, segment: Segment) -> tuple[frozenset[int], ...]:
    """For each output, the places of the inputs that a gradient can flow to: nothing behind a detach."""
    known = {name: frozenset([place]) for place, name in reversed(list(enumerate(segment.inputs)))}
    for place, name in enumerate(segment.inputs):
        known[name] |= {place}
    for name in segment.nodes:
        given = (*(given.name for given in locality.nodes[name].all_input_nodes), *names_of(name))
        known[name] = frozenset().union(*(known.get(one, ()) for one in given))
        meta = locality.metas[name]
        if locality.verdicts[name].operator in CONSTANT or (isinstance(meta, Shape) and not meta.has_gradient):
            known[name] = frozenset()
    return tuple(known[output] for output in segment.outputs)


def _shape(locality: Locality, name: str) -> Shape:
    meta = locality.metas[name]
    assert isinstance(meta, Shape)
    return meta


def _rank(locality: Locality, name: str) -> int:
    return len(_shape(locality, name).shape)


def _owned(box: Box, footprint: Footprint, rank: int) -> Subscript | None:
    """The part of an output that a tile owns (all of a reduction), or None where the box is empty."""
    if not all(box.shape):
        return None
    return () if footprint.reduction is not None else box.index(footprint.dims, rank)
