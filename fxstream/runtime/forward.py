"""The forward pass over the tiles of a segment: rules 1, 6, 7, 9, 10 and 11 of the NOTE in `tile_loop`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from fxstream.geometry.box import Box
from fxstream.machine.copies import to_device
from fxstream.machine.heap import heap_kept
from fxstream.machine.out_of_memory import OutOfMemory, catch_oom
from fxstream.runtime.prefetch import Image, Reader
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Stream, TileTask
from fxstream.runtime.tile_run import Inputs, OtherRows, TileRun, combined, halved, retried, rows_of

__all__ = ["Forward"]

HOST = torch.device("cpu")


class Forward:
    """All tiles, without recording but for those that are kept, where inputs need gradients."""

    def __init__(self, stream: Stream, tensors: Sequence[Image], needs_grad: Sequence[bool] | None = None) -> None:
        self._stream, self._needs_grad = stream, needs_grad
        self._inputs = Inputs.of(stream, tensors)
        self._outputs: dict[int, torch.Tensor] = {}
        self.runs: list[TileRun] = []
        self.others: OtherRows = {}

    def run(self) -> tuple[torch.Tensor, ...]:
        """The whole outputs; `runs` then has what the tiles leave for backward."""
        stream = self._stream
        self._outputs |= {k: torch.empty(0) for k in stream.sinks}
        with stream.raise_together():
            self._run_tiles([task for task in stream.schedule.tasks if not self._is_written(task)])
        if stream.ranks is not None:
            self._exchange(stream.ranks)
        for k in stream.combined:
            before, after = self.others.get(k, ([], []))
            self._outputs[k] = retried(stream, combined, stream, k, [*before, *rows_of(self.runs, k), *after])
        return tuple(output for _, output in sorted(self._outputs.items()))

    def _run_tiles(self, tasks: list[TileTask]) -> None:
        reading = Reader(self._inputs.spatial, tasks, self._inputs.device)
        with (
            reading as reader,
            heap_kept(self._inputs.device, len(tasks)),
            self._stream.watched("forward") as report,
        ):
            while len(self.runs) < len(tasks):
                run = catch_oom(functools.partial(self._run, reader, *tasks[len(self.runs) :][:2]))
                if isinstance(run, OutOfMemory):
                    self._degrade(tasks, run)
                else:
                    self.runs.append(run)
                    report(len(self.runs), len(tasks))

    def _exchange(self, ranks: Ranks) -> None:
        """Complete the maps of which this rank has some tiles; partial results of the others."""
        stream = self._stream
        for k, value in enumerate(stream.outputs):
            if k in stream.combined:
                rows = rows_of(self.runs, k)
                self.others[k] = ranks.gather_rows([row for row, _ in rows], [count for _, count in rows])
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

    def _run(self, reader: Reader, task: TileTask, following: TileTask | None = None) -> TileRun:
        """Run one tile and write its rectangles."""
        stream, boxes, recorded = self._stream, reader.read(task, following), None
        results: Sequence[torch.Tensor | None]
        if task.is_kept and self._needs_grad is not None:
            program = stream.schedule.programs[task.program].run
            recorded = self._inputs.recorded(task, boxes, self._needs_grad, program)
            results = recorded.results
        else:
            results = self._inputs.run(stream, task, boxes)
        partials = {}
        for k, (tile, owned) in enumerate(zip(results, task.outputs, strict=True)):
            if tile is None or owned is None:
                continue
            if k in stream.combined:
                partials[k] = tile.detach()
            elif k in stream.sinks:
                stream.sinks[k].write(Box.of(owned, stream.outputs[k].shape), tile)
            else:
                self._write(k, tile, owned)
        return TileRun(task, partials, recorded)

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

    def _degrade(self, tasks: list[TileTask], failure: OutOfMemory) -> None:
        """Rule 9: give up kept graphs, or halve the tile that comes next."""
        now = len(self.runs)
        if self._needs_grad is not None and any(task.is_kept for task in tasks):
            tasks[:] = [replace(task, is_kept=False) for task in tasks]
            for run, task in zip(self.runs, tasks, strict=False):
                run.task, run.recorded = task, None
        else:
            tasks[now : now + 1] = halved(self._stream, tasks[now], failure)
        self._stream.schedule.tasks = tuple(tasks)


def _allocate(tile: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An output of the type and memory format of its first tile."""
    layout = torch.contiguous_format
    for channels_last in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if channels_last is torch.channels_last else 5
        if tile.ndim == rank and not tile.is_contiguous() and tile.is_contiguous(memory_format=channels_last):
            layout = channels_last
    return torch.empty(shape, dtype=tile.dtype, device=device, memory_format=layout)
