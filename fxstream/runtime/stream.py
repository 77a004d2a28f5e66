"""A segment ready to run: its plan, the schedule of its tiles, and what takes part in running them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fxstream.geometry.box import Box
from fxstream.io.sink import Sink
from fxstream.rules import Reduced, Value
from fxstream.runtime.ranks import Ranks, assigned, together
from fxstream.runtime.replays.replays import Replays, Sweep
from fxstream.runtime.schedule import Schedule, Subscript, TileTask
from fxstream.runtime.tile_program import Compiler, Program
from fxstream.runtime.turns import bands, turns
from fxstream.tiling.segment import gradient_sources, runs_operators_alone
from fxstream.tiling.segment_plan import SegmentPlan, tile_arithmetic
from fxstream.tiling.templates import MemoOfStructure

__all__ = ["Stream", "Watch", "build_stream"]

Watch = Callable[[str, int, int], None]
"""Called with what runs, how many of its tiles are done, and of how many."""
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stream:
    """A segment made ready to run; only its `schedule` changes.

    `outputs` are the whole results, `combined` says how the partial results of those that are reductions are
    combined, by index. `labels` name the spatial and whole inputs, in that order, in the user's words; `sources`
    are the indices of the inputs that each output can send a gradient to. `sinks` take outputs of a call without
    gradients, by index, instead of a tensor. Where `ranks` share the tiles, `planned` are the tasks of each rank.
    `watch` is called for every tile. `offloaded` are the indices of the outputs that lie in host memory. `turns`
    is the number of turns that ranks take. Tiles may have `replays`.
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
    replays: Replays | None = None

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

    def sweep(
        self, whole: Sequence[torch.Tensor], device: torch.device
    ) -> contextlib.AbstractContextManager[Sweep]:
        """One sweep over the tiles that run here, with these whole inputs."""
        name, is_single = self.plan.segment.name, len(self.schedule.tasks) < 2
        if self.replays is None or is_single:
            return contextlib.nullcontext(Sweep(name, whole))
        return self.replays.sweep(name, whole, device, _largest(self.plan))

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
    replays: Replays | None = None,
) -> Stream:
    """The programs and the schedule of a planned segment.

    Where `ranks` share the tiles, a segment that runs whole runs on all of them alike. `memo` has the programs
    that were made at other sizes, `again` is what is run for the backward of one that is recomputed in parts.
    Tiles of operators of torch and of this package may have `replays`.
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
        replays=replays if runs_operators_alone(segment) else None,
    )


def _largest(plan: SegmentPlan) -> dict[Hashable, int]:
    """The most elements of the boxes and maps of a tile, and of their gradients, as `replays` name them."""
    segment, largest = plan.segment, dict[Hashable, int]()
    patterns = [(one, segment.graph.pattern(one)) for one in segment.outputs]
    maps = [(one, () if pattern.reduces else pattern.dims) for one, pattern in patterns]
    for names, values in ((("box", "backward"), segment.spatial), (("forward", "gradient"), maps)):
        for k, (name, dims) in enumerate(values):
            shape = list(segment.graph.value(name).shape)
            for dim, length in zip(dims, plan.largest(name) if dims else (), strict=True):
                shape[dim] = length
            largest |= {(group, k): math.prod(shape) for group in names}
    return largest


KEPT = 0.75
"""The time of a tile that is not recomputed over that of one that is."""


def _shared(plan: SegmentPlan, tasks: Sequence[TileTask], count: int) -> tuple[tuple[TileTask, ...], ...]:
    """The tiles of each rank, in order, balanced by their arithmetic."""
    costs = [cost * (KEPT if task.is_kept else 1) for cost, task in zip(tile_arithmetic(plan), tasks, strict=True)]
    pairs = list(zip(tasks, assigned(costs, count), strict=True))
    return tuple(tuple(task for task, owner in pairs if owner == rank) for rank in range(count))
