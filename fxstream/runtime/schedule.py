"""A segment made ready to run: the programs of its tile classes and the schedule of its tiles.

The schedule may change while it runs: where memory does not suffice for a tile, it is replaced by two that own
half of its outputs each. Any partition of the outputs gives the same results.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fxstream.geometry.box import EMPTY, Box, Interval
from fxstream.graph.typed_graph import TypedGraph
from fxstream.io.sink import Sink
from fxstream.rules import Reduced, Value
from fxstream.rules.access import Lookup
from fxstream.runtime.ranks import Ranks, assigned, together
from fxstream.runtime.tile_program import Compiler, Program, TileProgram, constants_of, tile_program, whole_program
from fxstream.runtime.turns import bands, turns
from fxstream.tiling.bounds import AxisTile, BoundsPass, lookups
from fxstream.tiling.segment import gradient_sources
from fxstream.tiling.segment_plan import SegmentPlan, tile_arithmetic
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["Schedule", "Stream", "Subscript", "TileTask", "Watch", "build_stream"]

Subscript = tuple[slice, ...]
Watch = Callable[[str, int, int], None]
"""Called with what runs, how many of its tiles are done, and of how many."""
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOCK = threading.RLock()
"""Of tiles and programs, which threads make that run one model at several sizes."""


@dataclass(frozen=True, slots=True, eq=False)
class TileTask:
    """One tile to run: which program, what it reads of each spatial input, what it owns of each output.

    `positions` are the pixels that it owns of each output, or of what a reduction reduces. `lookups` are the parts
    of tables that the program takes after its other inputs. `tile` is the tile along each axis; () is everything.
    `turn` is when it runs, where ranks write by turns.
    """

    program: int
    reads: tuple[Subscript, ...]
    outputs: tuple[Subscript | None, ...]
    positions: tuple[int, ...]
    is_kept: bool = False
    lookups: tuple[Lookup, ...] = ()
    tile: tuple[AxisTile, ...] = ()
    turn: int = 0


class Programs:
    """The programs of one segment at all sizes, by the classes of their tiles along each axis.

    Tiles of a class run the same program whatever the size of the image: those in its middle, and those at its
    start.
    """

    def __init__(self, compiler: Compiler | None) -> None:
        self._compiler = compiler
        self._fresh = itertools.count()
        self._classes: dict[tuple[int, object], int] = {}
        self._programs: dict[tuple[int, ...], TileProgram] = {}

    def class_along(self, axis: int, tile: AxisTile) -> int:
        """The class of a tile along one axis: equal programs, equal number."""
        if len(self._classes) > MOST_CLASSES:
            self._classes.clear()
        return self._classes.setdefault((axis, tile.program_key), next(self._fresh))

    def get(self, classes: tuple[int, ...], make: Callable[[], TileProgram]) -> TileProgram:
        """The program of tiles of these classes; () of what runs whole."""
        if classes not in self._programs:
            if len(self._programs) > MOST_PROGRAMS:
                self._programs.clear()
            program = make()
            self._programs[classes] = program if self._compiler is None else program.through(self._compiler)
        return self._programs[classes]


MOST_CLASSES, MOST_PROGRAMS = 64, 64
"""Classes and programs of one segment that are remembered: a megabyte or two."""


class Schedule:
    """The tiles of a segment that run here, in order, and the programs of their classes; it may change.

    A program is made when the first tile of its class is. `is_reduced` says that tiles had to be made smaller,
    `repeated` how many got the results of an equal one in the last forward; `every` are the tiles of the plan,
    whoever runs them.
    """

    def __init__(
        self,
        plan: SegmentPlan,
        compiler: Compiler | None,
        memo: MemoOfStructure | None = None,
        again: Program | None = None,
    ) -> None:
        self._segment = segment = plan.segment
        self._again = again
        key = ("programs", segment.graph.graph, constants_of(segment), compiler)
        self._of_all_sizes = (memo or MemoOfStructure()).get(key, lambda: Programs(compiler))
        self._along: list[dict[int, tuple[AxisTile, int]]] = [{} for _ in plan.axes]
        self._classes: dict[tuple[int, ...], int] = {}
        self._programs: list[TileProgram] = []
        self._plan = plan
        self._every: tuple[TileTask, ...] | None = None
        self._tasks: tuple[TileTask, ...] | None = None
        self.is_reduced = False
        self.repeated = 0

    @property
    def every(self) -> tuple[TileTask, ...]:
        """The tiles of the plan in order, whoever runs them, made when they are first asked for."""
        with LOCK:
            if self._every is None:
                self._every = self._planned()
            return self._every

    def _planned(self) -> tuple[TileTask, ...]:
        plan = self._plan
        if plan.axes:
            recomputed = plan.tile_count - plan.kept
            return tuple(self.task(tile, i >= recomputed) for i, tile in enumerate(plan.tiles()))
        reads, outputs = ((slice(None),),) * len(plan.segment.spatial), len(plan.segment.outputs)
        program = self._of_all_sizes.get((), lambda: whole_program(plan.segment))
        number = self._add(program if self._again is None else replace(program, recomputation=self._again))
        return (TileTask(number, reads, ((),) * outputs, (1,) * outputs, plan.kept > 0),)

    @property
    def tasks(self) -> tuple[TileTask, ...]:
        """The tiles that run here, in order."""
        return self.every if self._tasks is None else self._tasks

    @tasks.setter
    def tasks(self, tasks: tuple[TileTask, ...]) -> None:
        self._tasks = tasks

    @property
    def programs(self) -> list[TileProgram]:
        """The programs of the tiles, by the number in a task; those of the plan are made with its tiles."""
        return self._programs if self.every else []

    def task(self, tile: tuple[AxisTile, ...], is_kept: bool = False) -> TileTask:
        """The task of the tile that is the product of these."""
        segment, graph = self._segment, self._segment.graph
        reads = tuple(
            Box(tuple(along.boxes.get(name, EMPTY) for along in tile)).index(dims, len(graph.value(name).shape))
            for name, dims in segment.spatial
        )
        boxes = [Box(tuple(along.outputs[k] for along in tile)) for k in range(len(segment.outputs))]
        outputs = tuple(_owned(graph, output, box) for box, output in zip(boxes, segment.outputs, strict=True))
        positions = tuple(math.prod(box.shape) for box in boxes)
        tables = tuple(lookups(segment, tile).values())
        return TileTask(self._program(tile), reads, outputs, positions, is_kept, tables, tile)

    def halves(self, task: TileTask) -> tuple[TileTask, ...]:
        """Two tasks that own half of its outputs each, along its longest axis; () of what has one pixel."""
        lengths = [max(map(len, along.outputs)) for along in task.tile]
        if max(lengths, default=1) < 2:
            return ()
        axis = lengths.index(max(lengths))
        middles = [(owned.start + owned.stop + 1) // 2 for owned in task.tile[axis].outputs]
        pairs = list(zip(task.tile[axis].outputs, middles, strict=True))
        first = tuple(Interval(owned.start, middle) for owned, middle in pairs)
        second = tuple(Interval(middle, owned.stop) for owned, middle in pairs)
        tiles = [
            (*task.tile[:axis], BoundsPass(self._segment, axis).tile(part), *task.tile[axis + 1 :])
            for part in (first, second)
        ]
        return tuple(replace(self.task(tile, task.is_kept), turn=task.turn) for tile in tiles)

    def put(self, parts: Sequence[TileTask], task: TileTask) -> None:
        """Tasks in the place of one that is scheduled."""
        place = next(i for i, one in enumerate(self.tasks) if one is task)
        self.tasks = (*self.tasks[:place], *parts, *self.tasks[place + 1 :])

    def _program(self, tile: tuple[AxisTile, ...]) -> int:
        """The number of the program of the tile's class."""
        with LOCK:
            key = tuple(self._class_along(axis, along) for axis, along in enumerate(tile))
            if key not in self._classes:
                program = self._of_all_sizes.get(key, lambda: tile_program(self._segment, tile))
                self._classes[key] = self._add(program)
            return self._classes[key]

    def _add(self, program: TileProgram) -> int:
        self._programs.append(program)
        return len(self._programs) - 1

    def _class_along(self, axis: int, along: AxisTile) -> int:
        """The class of a tile along one axis: equal programs, equal number; tiles seen before by identity."""
        seen = self._along[axis]
        if id(along) not in seen:
            seen[id(along)] = along, self._of_all_sizes.class_along(axis, along)
        return seen[id(along)][1]


@dataclass(frozen=True, slots=True)
class Stream:
    """A segment made ready to run; only its `schedule` changes.

    `outputs` are the whole results, `combined` says how the partial results of those that are reductions are
    combined, by index. `labels` name the spatial and whole inputs, in that order, in the user's words; `sources`
    are the indices of the inputs that each output can send a gradient to. `sinks` take outputs of a call without
    gradients, by index, instead of a tensor. Where `ranks` share the tiles, `planned` are the tasks of each rank.
    `watch` is called for every tile. `offloaded` are the indices of the outputs that lie in host memory. `turns`
    is the number of turns that ranks take.
    """

    plan: SegmentPlan
    schedule: Schedule
    outputs: tuple[Value, ...]
    combined: Mapping[int, Combine]
    labels: tuple[str, ...]
    sources: tuple[frozenset[int], ...]
    ranks: Ranks | None = None
    planned: tuple[tuple[TileTask, ...], ...] = ()
    watch: Watch | None = None
    offloaded: frozenset[int] = frozenset()
    sinks: Mapping[int, Sink] = field(default_factory=dict)
    turns: int = 1

    @property
    def spatial_count(self) -> int:
        """How many of the inputs are cut into boxes; the rest is passed whole."""
        return len(self.plan.segment.spatial)

    def writing(self, sinks: Mapping[int, Sink]) -> Stream:
        """The same with sinks. Ranks then run bands of tiles, by turns; see the NOTE of `turns`."""
        if self.ranks is None:
            return replace(self, sinks=sinks)
        tasks, costs = self.schedule.every, tile_arithmetic(self.plan)
        ranks = bands(costs, self.ranks.count)
        when = turns(costs, ranks, [self._units(task, sinks) for task in tasks])
        timed = [replace(task, turn=turn) for task, turn in zip(tasks, when, strict=True)]
        pairs = list(zip(timed, ranks, strict=True))
        planned = tuple(tuple(task for task, owner in pairs if owner == rank) for rank in range(self.ranks.count))
        schedule = copy.copy(self.schedule)
        schedule.tasks = planned[self.ranks.rank]
        return replace(self, sinks=sinks, planned=planned, schedule=schedule, turns=1 + max(when))

    def _units(self, task: TileTask, sinks: Mapping[int, Sink]) -> frozenset[tuple[int, ...]]:
        """What a task writes into, over all sinks; the first number of a unit is that of its sink."""
        owned = [(k, sink, task.outputs[k]) for k, sink in sinks.items()]
        boxes = [(k, sink, Box.of(box, self.outputs[k].shape)) for k, sink, box in owned if box is not None]
        return frozenset((k, *unit) for k, sink, box in boxes for unit in sink.units(box))

    def owned_by_ranks(self, k: int) -> list[list[Subscript]]:
        """What the tiles of each rank own of an output."""
        return [[box for task in tasks if (box := task.outputs[k]) is not None] for tasks in self.planned]

    def raise_together(self) -> contextlib.AbstractContextManager[None]:
        """A block that every rank runs; if it fails on one, all raise."""
        return together(self.ranks)

    @property
    def repeated_text(self) -> str:
        """How many tiles got the results of an equal one in the last forward, in words; empty where none did."""
        repeated, name = self.schedule.repeated, self.plan.segment.name
        return (
            f"{name}: {repeated} of {len(self.schedule.tasks)} tiles were blank as another one" if repeated else ""
        )

    def title(self, what: str) -> str:
        """A pass over the tiles in words."""
        return f"{self.plan.segment.name} {what}"

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        """Progress callback for one pass, with a note; always reports completion, also on error."""
        watch = self.watch if self.plan.axes else None

        def report(done: int, total: int, note: str) -> None:
            if watch is not None:
                watch(self.title(what) + note, done, total)

        try:
            yield report
        finally:
            report(1, 1, "")


def build_stream(
    plan: SegmentPlan,
    labels: tuple[str, ...],
    *,
    compiler: Compiler | None = None,
    ranks: Ranks | None = None,
    watch: Watch | None = None,
    offloaded: frozenset[str] = frozenset(),
    memo: MemoOfStructure | None = None,
    again: Program | None = None,
) -> Stream:
    """The programs and the schedule of a planned segment.

    Where `ranks` share the tiles, a segment that runs whole runs on all of them alike. `memo` has the programs
    that were made at other sizes, `again` is what is run for the backward of one that is recomputed in parts.
    """
    segment, schedule = plan.segment, Schedule(plan, compiler, memo, again)
    patterns = enumerate(segment.graph[output].pattern for output in segment.outputs if plan.axes)
    planned: tuple[tuple[TileTask, ...], ...] = ()
    if ranks is not None and plan.axes:
        planned = _shared(plan, schedule.tasks, ranks.count)
        schedule.tasks = planned[ranks.rank]
    return Stream(
        plan,
        schedule,
        tuple(segment.graph.value(output) for output in segment.outputs),
        {k: pattern.combine for k, pattern in patterns if isinstance(pattern, Reduced)},
        labels,
        gradient_sources(segment),
        ranks if plan.axes else None,
        planned,
        watch,
        frozenset(k for k, output in enumerate(segment.outputs) if output in offloaded),
    )


KEPT = 0.75
"""The time of a tile that is not recomputed over that of one that is."""


def _shared(plan: SegmentPlan, tasks: Sequence[TileTask], count: int) -> tuple[tuple[TileTask, ...], ...]:
    """The tiles of each rank, in order, balanced by their arithmetic."""
    costs = [cost * (KEPT if task.is_kept else 1) for cost, task in zip(tile_arithmetic(plan), tasks, strict=True)]
    pairs = list(zip(tasks, assigned(costs, count), strict=True))
    return tuple(tuple(task for task, owner in pairs if owner == rank) for rank in range(count))


def _owned(graph: TypedGraph, output: str, box: Box) -> Subscript | None:
    """The part of an output that a tile owns (all of a reduction), or None where the box is empty."""
    if not all(box.shape):
        return None
    pattern = graph.pattern(output)
    return () if pattern.reduces else box.index(pattern.dims, len(graph.value(output).shape))
