"""The backward pass over the tiles of a segment: rules 2, 6, 7, 9, 10 and 12 of the NOTE in `tile_loop`."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch.autograd.graph import GradientEdge

from fxstream.errors import StreamError
from fxstream.machine.heap import heap_kept
from fxstream.machine.out_of_memory import OutOfMemory, catch_oom
from fxstream.runtime.accumulate import Accumulator, Contribution
from fxstream.runtime.equal_tiles import may_sum, summed
from fxstream.runtime.reading.prefetch import Image, Reader
from fxstream.runtime.replays.replays import Groups, Sweep, Tensors
from fxstream.runtime.schedule import TileTask
from fxstream.runtime.stream import Stream
from fxstream.runtime.tile_run import Inputs, OtherRows, Recorded, TileRun, combined, halved, retried, rows_of

__all__ = ["Backward"]

Gradients = Sequence[torch.Tensor | None]
Flowing = list[tuple[int, torch.Tensor]]
"""Gradients of results of a tile, by their index."""
Group = list[TileRun]
"""Equal tiles, of which the first stands for all, or one tile."""


class Backward:
    """Pull the gradients of the outputs back through one tile after the other, the last one first."""

    def __init__(
        self, stream: Stream, tensors: Sequence[Image], needs_grad: Sequence[bool], dtypes: Sequence[torch.dtype]
    ) -> None:
        self._stream, self._needs_grad, self._dtypes = stream, needs_grad, dtypes
        self._inputs = Inputs.of(stream, tensors)
        is_single = len(stream.schedule.tasks) == 1 and stream.ranks is None
        reads = [] if stream.ranks is not None else [task.reads for task in stream.schedule.tasks]
        self._sums = Accumulator(self._inputs.spatial, self._inputs.whole, needs_grad, is_single, reads)
        self._sweep = Sweep("", ())
        self._all_runs: list[TileRun] = []
        self._others: OtherRows = {}
        self._of_reductions: dict[int, torch.Tensor] = {}

    def run(self, runs: Sequence[TileRun], others: OtherRows, grads: Gradients) -> list[torch.Tensor | None]:
        """The gradients of the inputs. Kept tiles are the last ones, and are freed one by one."""
        stream = self._stream
        self._of_reductions = {k: grad for k in stream.combined if (grad := grads[k]) is not None}
        self._all_runs, self._others = list(runs), others
        for run in runs:  # backward may come again
            run.gradients = None
        with stream.raise_together():
            retried(stream, self._differentiate_reductions)
            self._pull_back_all(self._groups(runs), grads)
        return retried(stream, self._sums.gradients, stream.ranks)

    def _differentiate_reductions(self) -> None:
        """Give the runs that have none yet the gradients of their partial results (rule 7)."""
        fresh: dict[TileRun, dict[int, torch.Tensor]] = {r: {} for r in self._all_runs if r.gradients is None}
        for k, grad in self._of_reductions.items():
            with_partials = [run for run in self._all_runs if k in run.partials]
            if not with_partials:
                continue
            with torch.enable_grad():
                rows = [(row.detach().requires_grad_(), count) for row, count in rows_of(with_partials, k)]
                before, after = self._others.get(k, ([], []))
                result = combined(self._stream, k, [*before, *rows, *after])
                of_rows = torch.autograd.grad(result, [row for row, _ in rows], grad)
            for run, gradient in zip(with_partials, of_rows, strict=True):
                if run in fresh:
                    fresh[run][k] = gradient
        for run, gradients in fresh.items():
            run.gradients = gradients

    def _pull_back_all(self, groups: list[Group], grads: Gradients) -> None:
        stream, device = self._stream, self._inputs.device
        waiting = [group[0].task for group in reversed(groups) if group[0].recorded is None]
        done, total = 0, sum(map(len, groups))
        with (
            Reader(self._inputs.spatial, waiting, device, stream.title("backward")) as reader,
            heap_kept(device, total),
            stream.sweep(self._inputs.whole, device) as self._sweep,
            stream.watched("backward") as report,
        ):
            while groups:
                pulled = catch_oom(functools.partial(self._pulled_back, groups[-1], grads, reader))
                if isinstance(pulled, OutOfMemory):
                    total += self._degrade(groups, reader, pulled)
                    continue
                done += len(groups[-1])
                groups.pop()[0].recorded = None
                retried(self._stream, self._sums.add_all, pulled)
                report(done, total, reader.note)

    def _degrade(self, groups: list[Group], reader: Reader, failure: OutOfMemory) -> int:
        """Rule 9: give up replays, kept graphs, part equal tiles, or put halves in the place of the last tile.

        Returns how many tiles there are more.
        """
        if self._sweep.give_up(failure.message):
            return 0
        schedule = self._stream.schedule
        if any(group[0].recorded is not None for group in groups):
            for group in groups:
                group[0].recorded = None
            schedule.tasks = tuple(replace(task, is_kept=False) for task in schedule.tasks)
            return 0
        group = groups.pop()
        if len(group) > 1:
            groups += [[run] for run in group]
            return 0
        (last,) = group
        halves = self._halves(last, reader, failure)
        groups += [[half] for half in halves]
        index = self._all_runs.index(last)
        self._all_runs[index : index + 1] = halves
        retried(self._stream, self._differentiate_reductions)
        tasks = list(schedule.tasks)
        if last.task in tasks:  # another call of the segment may have changed them since
            index = tasks.index(last.task)
            tasks[index : index + 1] = [half.task for half in halves]
            schedule.tasks = tuple(tasks)
        return len(halves) - 1

    def _halves(self, run: TileRun, reader: Reader, failure: OutOfMemory) -> list[TileRun]:
        """The halves of a tile with their partial results; halves of halves where these run out of memory too."""
        halves = []
        for task in halved(self._stream, run.task, failure):
            half = catch_oom(functools.partial(self._half, task, tuple(run.partials), reader))
            if isinstance(half, OutOfMemory):
                halves += self._halves(TileRun(task, run.partials), reader, half)
            else:
                halves.append(half)
        return halves

    def _half(self, task: TileTask, reductions: Sequence[int], reader: Reader) -> TileRun:
        if not any(task.positions[k] for k in reductions):
            return TileRun(task, {})
        boxes, program = reader.read(task).placed(), self._stream.schedule.programs[task.program]
        with torch.no_grad():
            results = self._inputs.run(program.run, self._inputs.tile(task, boxes))
        return TileRun(task, {k: tile for k in reductions if (tile := results[k]) is not None})

    def _pulled_back(self, group: Group, grads: Gradients, reader: Reader) -> list[Contribution]:
        """What equal tiles give together; the first is run again unless its graph was kept."""
        flowing = self._flowing(group, grads)
        if not flowing:
            return []
        task, recorded = group[0].task, group[0].recorded
        if recorded is None:
            gradients = self._recomputed(task, reader, flowing)
        else:
            gradients = self._gradients(recorded, flowing)
        boxes_read = (*task.reads, *(None for _ in self._inputs.whole))
        pairs = enumerate(zip(boxes_read, gradients, strict=True))
        return [(i, box, gradient) for i, (box, gradient) in pairs if gradient is not None]

    def _recomputed(self, task: TileTask, reader: Reader, flowing: Flowing) -> Gradients:
        """The gradients of the inputs of a tile that runs again."""
        inputs, program = self._inputs, self._stream.schedule.programs[task.program]
        boxes = reader.read(task).placed()
        outputs = tuple(k for k, _ in flowing)
        tile = {**inputs.tile(task, boxes), "gradient": [gradient for _, gradient in flowing]}

        def gradients_of(whole: Tensors, tile: Groups) -> Gradients:
            recorded, _ = inputs.with_whole(whole).recorded(program.run_again, tile, self._needs_grad)
            return self._gradients(recorded, list(zip(outputs, tile["gradient"], strict=True)))

        what = program, outputs, tuple(self._needs_grad), self._dtypes
        return self._sweep.compute("backward", what, tile, gradients_of)

    def _gradients(self, recorded: Recorded, flowing: Flowing) -> Gradients:
        """The gradients of the inputs of a tile that ran with recording; None of those that have none."""
        pulled = [(edge, grad) for k, grad in flowing if (edge := self._edge(recorded, k, grad)) is not None]
        inputs = (*recorded.boxes, *recorded.whole)
        indices = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        if pulled and indices:
            edges, slices = zip(*pulled, strict=True)
            made = torch.autograd.grad(edges, [inputs[i] for i in indices], slices, allow_unused=True)
            for index, gradient in zip(indices, made, strict=True):
                gradients[index] = gradient
        return gradients

    def _flowing(self, group: Group, grads: Gradients) -> Flowing:
        """The gradients of what equal tiles yield, summed, by output, on the device that computes."""
        device, flowing = self._inputs.device, []
        for k, grad in enumerate(grads):
            if grad is None or group[0].task.outputs[k] is None:
                continue
            if k in self._stream.combined:
                of_tiles = [run.gradients[k] for run in group if run.gradients is not None]
            else:
                of_tiles = [grad[owned] for run in group if (owned := run.task.outputs[k]) is not None]
            total = summed([of_tile.to(device) for of_tile in of_tiles])
            flowing.append((k, group[0].task.around(k, total)))
        return flowing

    def _groups(self, runs: Sequence[TileRun]) -> list[Group]:
        """The runs; equal ones together, at the place of the first, where their gradients may be summed."""
        if not may_sum(self._stream, self._needs_grad, self._dtypes):
            return [[run] for run in runs]
        groups: dict[Hashable, Group] = {}
        for run in runs:
            groups.setdefault(run if run.key is None else run.key, []).append(run)
        return list(groups.values())

    def _edge(self, recorded: Recorded, k: int, gradient: torch.Tensor) -> GradientEdge | None:
        """Where the gradient of an output enters; None where none flows through it.

        Raises `StreamError` where a recomputed tile has another shape or type than that of forward.
        """
        end = recorded.ends[k]
        assert end is not None
        same_type = k in self._stream.combined or end.dtype == self._dtypes[k]
        if not same_type or end.shape != gradient.shape:
            raise StreamError(
                f"a recomputed tile of `{self._stream.plan.segment.outputs[k]}` is {end.dtype}"
                f" {list(end.shape)}, but forward had {self._dtypes[k]} {list(gradient.shape)}"
            )
        return end.edge
