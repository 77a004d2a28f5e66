"""The backward pass over the tiles of a segment: rules 2, 6, 7, 9 and 10 of the NOTE in `tile_loop`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fxstream.errors import StreamError
from fxstream.machine.heap import heap_kept
from fxstream.machine.out_of_memory import OutOfMemory, catch_oom
from fxstream.runtime.accumulate import Accumulator, Contribution
from fxstream.runtime.prefetch import Image, Reader
from fxstream.runtime.schedule import Stream, TileTask
from fxstream.runtime.tile_run import Inputs, OtherRows, Recorded, TileRun, combined, halved, retried, rows_of

__all__ = ["Backward"]

Gradients = Sequence[torch.Tensor | None]


class Backward:
    """Pull the gradients of the outputs back through one tile after the other, the last one first."""

    def __init__(
        self, stream: Stream, tensors: Sequence[Image], needs_grad: Sequence[bool], dtypes: Sequence[torch.dtype]
    ) -> None:
        self._stream, self._needs_grad, self._dtypes = stream, needs_grad, dtypes
        self._inputs = Inputs.of(stream, tensors)
        is_single = len(stream.schedule.tasks) == 1 and stream.ranks is None
        self._sums = Accumulator(self._inputs.spatial, self._inputs.whole, needs_grad, is_single)
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
            self._pull_back_all(list(runs), grads)
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

    def _pull_back_all(self, runs: list[TileRun], grads: Gradients) -> None:
        waiting = [run.task for run in reversed(runs) if run.recorded is None]
        done = 0
        reading = Reader(self._inputs.spatial, waiting, self._inputs.device)
        with (
            reading as reader,
            heap_kept(self._inputs.device, len(runs)),
            self._stream.watched("backward") as report,
        ):
            while runs:
                following = runs[-2].task if len(runs) > 1 and runs[-2].recorded is None else None
                pulled = catch_oom(functools.partial(self._pulled_back, runs[-1], grads, reader, following))
                if isinstance(pulled, OutOfMemory):
                    self._degrade(runs, reader, pulled)
                    continue
                runs.pop().recorded = None
                retried(self._stream, self._sums.add_all, pulled)
                done += 1
                report(done, done + len(runs))

    def _degrade(self, runs: list[TileRun], reader: Reader, failure: OutOfMemory) -> None:
        """Rule 9: give up kept graphs, or put two halves in the place of the last tile."""
        schedule = self._stream.schedule
        if any(run.recorded is not None for run in runs):
            for run in runs:
                run.recorded = None
            schedule.tasks = tuple(replace(task, is_kept=False) for task in schedule.tasks)
            return
        last = runs.pop()
        halves = self._halves(last, reader, failure)
        runs += halves
        index = self._all_runs.index(last)
        self._all_runs[index : index + 1] = halves
        retried(self._stream, self._differentiate_reductions)
        tasks = list(schedule.tasks)
        if last.task in tasks:  # another call of the segment may have changed them since
            index = tasks.index(last.task)
            tasks[index : index + 1] = [half.task for half in halves]
            schedule.tasks = tuple(tasks)

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
        with torch.no_grad():
            results = self._inputs.run(self._stream, task, reader.read(task))
        return TileRun(task, {k: tile for k in reductions if (tile := results[k]) is not None})

    def _pulled_back(
        self, run: TileRun, grads: Gradients, reader: Reader, following: TileTask | None
    ) -> list[Contribution]:
        """What one tile gives, which is run again unless its graph was kept."""
        flowing = self._flowing(run, grads)
        if not flowing:
            return []
        recorded, task = run.recorded, run.task
        if recorded is None:
            program = self._stream.schedule.programs[task.program].run_again
            boxes = reader.read(task, following)
            recorded = self._inputs.recorded(task, boxes, self._needs_grad, program)
        self._check_recomputed(recorded, flowing)
        pulled = [(recorded.results[k], grad) for k, grad in flowing if recorded.results[k].requires_grad]
        inputs = (*recorded.boxes, *recorded.whole)
        indices = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
        if not pulled or not indices:
            return []
        outputs, slices = zip(*pulled, strict=True)
        gradients = torch.autograd.grad(outputs, [inputs[i] for i in indices], slices, allow_unused=True)
        boxes_read = (*task.reads, *(None for _ in recorded.whole))
        return [(i, boxes_read[i], g) for i, g in zip(indices, gradients, strict=True) if g is not None]

    def _flowing(self, run: TileRun, grads: Gradients) -> list[tuple[int, torch.Tensor]]:
        """The gradients of what a tile yields, by output, on the device that computes."""
        partial, device = run.gradients or {}, self._inputs.device
        flowing = []
        for k, (grad, owned) in enumerate(zip(grads, run.task.outputs, strict=True)):
            if grad is not None and owned is not None:
                of_tile = partial[k] if k in self._stream.combined else grad[owned]
                flowing.append((k, of_tile.to(device)))
        return flowing

    def _check_recomputed(self, recorded: Recorded, flowing: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Raises `StreamError` where a recomputed tile has another shape or type than that of forward."""
        for k, grad in flowing:
            tile = recorded.results[k]
            same_type = k in self._stream.combined or tile.dtype == self._dtypes[k]
            if not same_type or tile.shape != grad.shape:
                raise StreamError(
                    f"a recomputed tile of `{self._stream.plan.segment.outputs[k]}` is {tile.dtype}"
                    f" {list(tile.shape)}, but forward had {self._dtypes[k]} {list(grad.shape)}"
                )
