"""The forward pass over the tiles of a segment: rules 1, 6, 7 and 9 to 12 of the NOTE in `tile_loop`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from fxstream.geometry.box import Box
from fxstream.machine.copies import to_device
from fxstream.machine.heap import heap_kept
from fxstream.machine.out_of_memory import OutOfMemory, catch_oom
from fxstream.runtime.equal_tiles import tile_key
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.reading.prefetch import Image, Reader
from fxstream.runtime.replays.replays import Groups, Results, Sweep, Tensors
from fxstream.runtime.schedule import TileTask
from fxstream.runtime.stream import Stream
from fxstream.runtime.tile_run import Inputs, OtherRows, Recorded, TileRun, combined, halved, retried, rows_of

__all__ = ["Forward"]

logger = logging.getLogger("fxstream")
HOST = torch.device("cpu")

MOST_WRITTEN = 4
"""So many tiles that were written elsewhere are kept in host memory for tiles that are equal."""


@dataclass(frozen=True, slots=True)
class _First:
    """The tile whose results equal tiles get, and those of them that were written elsewhere."""

    run: TileRun
    written: dict[int, torch.Tensor]


class Forward:
    """All tiles, without recording but for those that are kept, where inputs need gradients."""

    def __init__(self, stream: Stream, tensors: Sequence[Image], needs_grad: Sequence[bool] | None = None) -> None:
        self._stream, self._needs_grad = stream, needs_grad
        self._inputs = Inputs.of(stream, tensors)
        self._outputs: dict[int, torch.Tensor] = {}
        self._firsts: dict[Hashable, _First] = {}
        self._repeated = 0
        self._sweep = Sweep("", ())
        self.runs: list[TileRun] = []
        self.others: OtherRows = {}

    def run(self) -> tuple[torch.Tensor, ...]:
        """The whole outputs; `runs` then has what the tiles leave for backward."""
        stream = self._stream
        if stream.plan.skips:
            return self._skip()
        self._outputs |= {k: torch.empty(0) for k in stream.sinks}
        for turn in range(stream.turns):
            tasks = [task for task in stream.schedule.tasks if task.turn == turn and not self._is_written(task)]
            with stream.raise_together():
                self._run_tiles(tasks)
        if stream.ranks is not None:
            self._exchange(stream.ranks)
        for k in stream.combined:
            before, after = self.others.get(k, ([], []))
            self._outputs[k] = retried(stream, combined, stream, k, [*before, *rows_of(self.runs, k), *after])
        return tuple(output for _, output in sorted(self._outputs.items()))

    def _skip(self) -> tuple[torch.Tensor, ...]:
        """Zeros without memory in the place of outputs of which nothing but the gradient is asked for."""
        self.runs = [TileRun(task, {}) for task in self._stream.schedule.tasks]
        return tuple(
            torch.zeros((), dtype=value.dtype, device=self._inputs.device).expand(value.shape)
            for value in self._stream.outputs
        )

    def _run_tiles(self, tasks: list[TileTask]) -> None:
        stream, device, done = self._stream, self._inputs.device, 0
        dims = [dims for _, dims in stream.plan.segment.spatial] if len(tasks) > 1 else []
        with (
            Reader(self._inputs.spatial, tasks, device, stream.title("forward"), dims) as reader,
            heap_kept(device, len(tasks)),
            stream.sweep(self._inputs.whole, device) as self._sweep,
            stream.watched("forward") as report,
        ):
            while done < len(tasks):
                run = catch_oom(functools.partial(self._run, reader, tasks[done]))
                if isinstance(run, OutOfMemory):
                    self._degrade(tasks, done, run)
                else:
                    self.runs.append(run)
                    done += 1
                    report(done, len(tasks), reader.note)
        stream.schedule.repeated = self._repeated
        if self._repeated:
            logger.info("%s, and took its results", stream.repeated_text)

    def _exchange(self, ranks: Ranks) -> None:
        """Complete the maps of which this rank has some tiles; partial results of the others."""
        stream = self._stream
        for k, value in enumerate(stream.outputs):
            if k in stream.combined:
                rows = rows_of(self.runs, k)
                self.others[k] = ranks.gather_rows([row for row, _ in rows], [count for _, count in rows])
                continue
            if k in stream.sinks:
                continue
            if k not in self._outputs:  # no tile of it is this rank's
                self._outputs[k] = torch.empty(value.shape, dtype=value.dtype, device=self._inputs.device)
            ranks.exchange(self._outputs[k], stream.owned_by_ranks(k))

    def _is_written(self, task: TileTask) -> bool:
        """Whether everything that a tile yields was written before."""
        stream = self._stream
        return bool(stream.sinks) and all(
            owned is None
            or (k in stream.sinks and stream.sinks[k].is_written(Box.of(owned, stream.outputs[k].shape)))
            for k, owned in enumerate(task.outputs)
        )

    def _run(self, reader: Reader, task: TileTask) -> TileRun:
        """Run one tile and write its rectangles; one that reads what another has read gets that one's results."""
        boxes = reader.read(task)
        key = tile_key(task, boxes.constant, self._inputs.device)
        first = None if key is None else self._firsts.get(key)
        if first is None:
            results, recorded = self._computed(task, boxes.placed())
            results = task.owned(results)
        else:
            results, recorded = [self._result(first, k) for k in range(len(task.outputs))], None
        run = TileRun(task, self._kept_of(task, results), recorded, key=key)
        if first is not None:
            self._repeated += 1
        elif key is not None:
            self._remember(run, results)
        return run

    def _computed(self, task: TileTask, boxes: list[torch.Tensor]) -> tuple[Results, Recorded | None]:
        inputs, program = self._inputs, self._stream.schedule.programs[task.program]
        tile = inputs.tile(task, boxes)
        if task.is_kept and self._needs_grad is not None:
            recorded, results = inputs.recorded(program.run, tile, self._needs_grad)
            return results, recorded

        def results_of(whole: Tensors, tile: Groups) -> Results:
            return inputs.with_whole(whole).run(program.run, tile)

        return self._sweep.compute("forward", program, tile, results_of), None

    def _kept_of(self, task: TileTask, results: Results) -> dict[int, torch.Tensor]:
        """Write what a tile yields of maps; its partial results of reductions."""
        stream, partials = self._stream, {}
        for k, (tile, owned) in enumerate(zip(results, task.outputs, strict=True)):
            if tile is None or owned is None:
                continue
            if k in stream.combined:
                partials[k] = self._sweep.lasting(tile.detach())
            elif k in stream.sinks:
                stream.sinks[k].write(Box.of(owned, stream.outputs[k].shape), tile)
            else:
                self._write(k, tile, owned)
        return partials

    def _remember(self, run: TileRun, results: Results) -> None:
        """Let later tiles have the results of this one; of those that are not in memory, a few are kept there."""
        sinks = self._stream.sinks
        written = {k: tile.cpu() for k, tile in enumerate(results) if k in sinks and tile is not None}
        self._firsts[run.key] = _First(run, written)
        if sinks and len(self._firsts) > MOST_WRITTEN:
            del self._firsts[next(iter(self._firsts))]

    def _result(self, first: _First, k: int) -> torch.Tensor | None:
        """An output of a tile that ran before."""
        owned = first.run.task.outputs[k]
        if owned is None or k in first.written:
            return first.written.get(k)
        return first.run.partials[k] if k in self._stream.combined else self._outputs[k][owned]

    def _write(self, k: int, tile: torch.Tensor, owned: tuple[slice, ...]) -> None:
        """Write a tile's rectangle of a map; a tile that is all of it becomes the map."""
        stream = self._stream
        if tile.shape == stream.outputs[k].shape and k not in stream.offloaded:
            self._outputs[k] = tile.detach()
            return
        if k not in self._outputs:
            device = HOST if k in stream.offloaded else tile.device
            self._outputs[k] = _allocate(tile, stream.outputs[k].shape, device)
        self._outputs[k][owned] = to_device(tile, self._outputs[k].device)

    def _degrade(self, tasks: list[TileTask], now: int, failure: OutOfMemory) -> None:
        """Rule 9: give up replays, then kept graphs, or halve the tile that comes next."""
        if self._sweep.give_up(failure.message):
            return
        if self._needs_grad is not None and any(task.is_kept for task in tasks):
            tasks[:] = [replace(task, is_kept=False) for task in tasks]
            for run, task in zip(self.runs, tasks, strict=False):
                run.task, run.recorded = task, None
            self._stream.schedule.tasks = tuple(tasks)
        else:
            halves = halved(self._stream, tasks[now], failure)
            self._stream.schedule.put(halves, tasks[now])
            tasks[now : now + 1] = halves


def _allocate(tile: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An output of the type and memory format of its first tile."""
    layout, tile = torch.contiguous_format, torch.empty_like(tile, device="meta")  # dense, as a cut is not
    for channels_last in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if channels_last is torch.channels_last else 5
        if tile.ndim == rank and not tile.is_contiguous() and tile.is_contiguous(memory_format=channels_last):
            layout = channels_last
    return torch.empty(shape, dtype=tile.dtype, device=device, memory_format=layout)
