"""The programs of a segment's tile classes and the schedule of its tiles.

The schedule may change while it runs: where memory does not suffice for a tile, it is replaced by two that own
half of its outputs each. Any partition of the outputs gives the same results.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.geometry.box import EMPTY, Box, Interval
from fxstream.graph.typed_graph import TypedGraph
from fxstream.rules.access import Lookup
from fxstream.runtime.tile_program import (
    Compiler,
    Program,
    TileProgram,
    constants_of,
    crop,
    tile_program,
    whole_program,
)
from fxstream.tiling.axes.bounds import AxisTile, BoundsPass, lookups
from fxstream.tiling.segment_plan import SegmentPlan
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["Schedule", "Subscript", "TileTask"]

Subscript = tuple[slice, ...]
LOCK = threading.RLock()
"""Of tiles and programs, which threads make that run one model at several sizes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a tile owns of a result of its program: along each dim how many pixels before and after it does not."""

    dims: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]

    def of(self, result: torch.Tensor) -> torch.Tensor:
        """What the tile owns."""
        sides = zip(self.dims, self.sides, strict=True)
        return crop(result, *((dim, before, result.shape[dim] - before - after) for dim, (before, after) in sides))

    def padded(self, owned: torch.Tensor) -> torch.Tensor:
        """What it owns, with zeros around."""
        pads = [0] * (2 * (owned.ndim - min(self.dims)))
        for dim, sides in zip(self.dims, self.sides, strict=True):
            first = 2 * (owned.ndim - 1 - dim)
            pads[first : first + 2] = sides
        return torch.constant_pad_nd(owned, pads)


@dataclass(frozen=True, slots=True, eq=False)
class TileTask:
    """One tile to run: which program, what it reads of each spatial input, what it owns of each output.

    `positions` are the pixels that it owns of each output, or of what a reduction reduces. `lookups` are the parts
    of tables that the program takes after its other inputs. `tile` is the tile along each axis; () is everything.
    `turn` is when it runs, where ranks write by turns. `cuts` are what the tile owns of the program's results,
    where it does not own all of each.
    """

    program: int
    reads: tuple[Subscript, ...]
    outputs: tuple[Subscript | None, ...]
    positions: tuple[int, ...]
    is_kept: bool = False
    lookups: tuple[Lookup, ...] = ()
    tile: tuple[AxisTile, ...] = ()
    turn: int = 0
    cuts: tuple[Cut | None, ...] = ()

    @property
    def is_uniform(self) -> bool:
        """Whether its boxes have the shape of all others, along some axis."""
        return any(along.yields is not None for along in self.tile)

    def owned(self, results: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What the tile owns of the results of its program; views."""
        cuts = self.cuts or (None,) * len(results)
        pairs = zip(results, cuts, strict=True)
        return [cut.of(result) if cut is not None and result is not None else result for result, cut in pairs]

    def around(self, k: int, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a result of its program from that of what the tile owns of it."""
        cut = self.cuts[k] if self.cuts else None
        return gradient if cut is None else cut.padded(gradient)


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
        cuts = tuple(
            _cut(graph, output, [along.sides(k) for along in tile]) if outputs[k] is not None else None
            for k, output in enumerate(segment.outputs)
        )
        return TileTask(self._program(tile), reads, outputs, positions, is_kept, tables, tile, cuts=cuts)

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


def _cut(graph: TypedGraph, output: str, sides: Sequence[tuple[int, int]]) -> Cut | None:
    """What a tile owns of what its program makes of an output; None where it owns all."""
    return Cut(graph.pattern(output).dims, tuple(sides)) if any(map(any, sides)) else None


def _owned(graph: TypedGraph, output: str, box: Box) -> Subscript | None:
    """The part of an output that a tile owns (all of a reduction), or None where the box is empty."""
    if not all(box.shape):
        return None
    pattern = graph.pattern(output)
    return () if pattern.reduces else box.index(pattern.dims, len(graph.value(output).shape))
