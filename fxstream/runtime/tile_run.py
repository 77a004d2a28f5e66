"""One tile of a call: its inputs, its run with or without recording, and what it leaves for backward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxstream.errors import StreamError, StreamingWarning
from fxstream.machine.copies import dense
from fxstream.machine.out_of_memory import OutOfMemory, catch_oom
from fxstream.runtime.ranks import Rows
from fxstream.runtime.reading.prefetch import Image
from fxstream.runtime.replays.replays import Groups, Results
from fxstream.runtime.schedule import TileTask
from fxstream.runtime.stream import Stream

__all__ = ["Inputs", "OtherRows", "Recorded", "TileRun", "combined", "halved", "retried", "rows_of"]

T = TypeVar("T")
Run = Callable[..., Results]
"""A tile's program."""
OtherRows = dict[int, tuple[Rows, Rows]]
"""The partial results of the ranks before and after this one, by output."""


@dataclass(frozen=True, slots=True)
class End:
    """Where a gradient enters the graph of a tile: the edge of a result, which need not be there any more."""

    edge: GradientEdge | None
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, result: torch.Tensor) -> End:
        """That of a result; without an edge where it has no gradient."""
        edge = get_gradient_edge(result) if result.requires_grad else None
        return cls(edge, result.shape, result.dtype)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A tile that ran with recording: what it read of the spatial inputs, the whole inputs, the ends of its graph.

    Its results are not held: what a backward needs of them autograd has saved.
    """

    boxes: list[torch.Tensor]
    whole: list[torch.Tensor]
    ends: tuple[End | None, ...]


@dataclass(slots=True, eq=False)
class TileRun:
    """One tile of one call of a segment: its partial results of reductions by output, its graph if it is kept.

    Tiles of one `key` have the same results.
    """

    task: TileTask
    partials: dict[int, torch.Tensor]
    recorded: Recorded | None = None
    gradients: dict[int, torch.Tensor] | None = None
    key: Hashable | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """The spatial and whole inputs of one call of a segment, without their history, and where it computes."""

    spatial: tuple[Image, ...]
    whole: tuple[torch.Tensor, ...]
    device: torch.device
    leaves: dict[tuple[bool, ...], list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, stream: Stream, tensors: Sequence[Image]) -> Inputs:
        """The inputs among all tensors that the segment is called with."""
        bare = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        spatial, whole = tuple(bare[: stream.spatial_count]), tuple(bare[stream.spatial_count :])
        # A spatial input may lie in host memory; whole inputs lie where the model is.
        return cls(spatial, whole, (*whole, *spatial)[0].device)  # type: ignore[arg-type]

    def with_whole(self, whole: Sequence[torch.Tensor]) -> Inputs:
        """Those of a tile that is given other whole inputs of the same values."""
        return self if whole is self.whole else Inputs((), tuple(whole), self.device)

    def run(self, program: Run, tile: Groups) -> Results:
        """The results of one tile, without recording."""
        return program(*tile["box"], *self.whole, *tile["table"])

    def recorded(self, program: Run, tile: Groups, needs_grad: Sequence[bool]) -> tuple[Recorded, Results]:
        """One tile with recording, for gradients of the inputs that need one, and its results."""
        with torch.enable_grad():
            boxes = [box.requires_grad_(needed) for box, needed in zip(tile["box"], needs_grad, strict=False)]
            whole = self._leaves(tuple(needs_grad[len(boxes) :]))
            results = program(*boxes, *whole, *tile["table"])
            return Recorded(boxes, whole, tuple(None if r is None else End.of(r) for r in results)), results

    def _leaves(self, needs_grad: tuple[bool, ...]) -> list[torch.Tensor]:
        """The whole inputs as leaves, which all tiles of a pass share: each has its own gradients."""
        if needs_grad not in self.leaves:
            pairs = zip(self.whole, needs_grad, strict=True)
            self.leaves[needs_grad] = [tensor.detach().requires_grad_(needed) for tensor, needed in pairs]
        return self.leaves[needs_grad]

    def tile(self, task: TileTask, boxes: Sequence[torch.Tensor]) -> Groups:
        """What is of one tile: its boxes, and what it takes from tables.

        Uniform ones are without gaps, so that a compiled program serves images of all sizes.
        """
        boxes = list(map(dense, boxes)) if task.is_uniform else boxes
        tables = [tensor for lookup in task.lookups for tensor in lookup.tensors(self.device)]
        return {"box": boxes, "table": tables}


def rows_of(runs: Sequence[TileRun], k: int) -> Rows:
    """The partial results of a reduction and how many positions each is of."""
    return [(run.partials[k], run.task.positions[k]) for run in runs if k in run.partials]


def combined(stream: Stream, k: int, rows: Rows) -> torch.Tensor:
    """The whole result of a reduction (rule 7)."""
    partials = torch.stack([row for row, _ in rows])
    counts = torch.tensor([count for _, count in rows], dtype=torch.float64, device=partials.device)
    return stream.combined[k](partials, counts).to(stream.outputs[k].dtype)


def retried(stream: Stream, function: Callable[..., T], *args: object) -> T:
    """The function's result, tried again where memory ran out. Raises `StreamError` if it does again."""
    call = functools.partial(function, *args)
    result = catch_oom(call)
    if isinstance(result, OutOfMemory):
        result = catch_oom(call)
    if isinstance(result, OutOfMemory):
        raise StreamError(
            f"out of memory for the results of `{stream.plan.segment.name}`: {result.message}. Plan with less:"
            " memory= below what the device has free"
        )
    return result


def halved(stream: Stream, task: TileTask, failure: OutOfMemory) -> tuple[TileTask, ...]:
    """Two tiles in the place of one, with a warning per segment. Raises `StreamError` where nothing is smaller."""
    halves, (first, last) = stream.schedule.halves(task), stream.plan.segment.ends
    name = f"`{stream.plan.segment.name}` ({first} .. {last})"
    if not halves:
        raise StreamError(
            f"out of memory in {name}, which cannot run in smaller parts: {failure.message}. Plan with less:"
            " memory= below what the device has free"
        )
    if not stream.schedule.is_reduced:
        stream.schedule.is_reduced = True
        warnings.warn(
            f"{name} ran out of memory: its tiles are made smaller where needed, with the same results. A smaller"
            " memory= plans for it",
            StreamingWarning,
            stacklevel=2,
        )
    return halves
