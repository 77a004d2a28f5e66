"""The gradients of all inputs of a segment, summed over its tiles."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from fxstream.io.source import Source
from fxstream.machine.copies import to_device
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Subscript

__all__ = ["Accumulator", "Contribution"]

Contribution = tuple[int, Subscript | None, torch.Tensor]
"""What one tile adds to a gradient: the input's index, the box that the tile read (None: all), the gradient."""


Bounds = tuple[tuple[int | None, int | None], ...]
"""The start and stop of a box along each dim."""


class Accumulator:
    """One sum per input that asks for a gradient; parameters of less than 32 bits are summed in float32.

    `add` either happens or does not, so that one that runs out of memory can be repeated; so can `add_all`, with
    what it left in its list. The gradient of an input that the boxes of all tiles partition is written box by box,
    and not summed; `reads` are these boxes, of each tile.
    """

    def __init__(
        self,
        spatial: Sequence[torch.Tensor | Source],
        whole: Sequence[torch.Tensor],
        needs_grad: Sequence[bool],
        is_single: bool,
        reads: Sequence[tuple[Subscript, ...]] = (),
    ) -> None:
        self._inputs, self._needs_grad, self._is_single = (*spatial, *whole), needs_grad, is_single
        self._sums: list[torch.Tensor | None] = [None] * len(self._inputs)
        differentiated = [i for i, needed in enumerate(needs_grad[: len(spatial)]) if needed]
        boxes = {i: [read[i] for read in reads] for i in differentiated}
        self._unwritten: list[dict[Bounds, Subscript]] = [
            {_bounds(box): box for box in boxes[i]} if i in boxes and _is_partition(boxes[i], image.shape) else {}
            for i, image in enumerate(spatial)
        ]
        """The boxes of each spatial input that are yet to be written."""

    def add_all(self, contributions: list[Contribution]) -> None:
        """Accumulate what one tile adds; what is accumulated leaves the list. Sums that exist take one call."""
        first: list[Contribution] = []
        more: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, box, gradient in contributions:
            total = self._sums[index]
            if box is not None or total is None:
                first.append((index, box, gradient))
            else:
                more.append((total, gradient))
        if more:
            torch._foreach_add_(*map(list, zip(*more, strict=True)))  # type: ignore[call-overload]
            contributions[:] = first
        while contributions:
            self.add(*contributions[-1])
            contributions.pop()

    def add(self, index: int, box: Subscript | None, gradient: torch.Tensor) -> None:
        """Accumulate one tile's gradient into input `index`, or into the region of it that the tile read."""
        if box is None:
            self._add_whole(index, gradient)
        else:
            self._add_box(index, box, gradient)

    def _add_box(self, index: int, box: Subscript, gradient: torch.Tensor) -> None:
        image, total = self._inputs[index], self._sums[index]
        assert isinstance(image, torch.Tensor)
        if self._is_single and gradient.shape == image.shape:
            self._sums[index] = to_device(gradient, image.device)
            return
        unwritten = self._unwritten[index]
        if total is None:
            total = self._sums[index] = torch.empty_like(image) if unwritten else torch.zeros_like(image)
        if unwritten.pop(_bounds(box), None) is not None:
            total[box].copy_(gradient)
            return
        self._clear(index)
        total[box].add_(to_device(gradient, total.device))

    def _clear(self, index: int) -> None:
        """Zeros in the boxes that are yet to be written."""
        total, unwritten = self._sums[index], self._unwritten[index]
        while total is not None and unwritten:
            total[next(iter(unwritten.values()))].zero_()
            unwritten.pop(next(iter(unwritten)))

    def _add_whole(self, index: int, gradient: torch.Tensor) -> None:
        total = self._sums[index]
        if self._is_single:
            self._sums[index] = gradient
        elif total is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[index] = gradient.to(wide, copy=True)
        else:
            total += gradient

    def gradients(self, ranks: Ranks | None = None) -> list[torch.Tensor | None]:
        """The sums, over all ranks, in the type of their input; None where nothing was asked for or flowed."""
        for index in range(len(self._unwritten)):
            self._clear(index)
        sums = self._sums if ranks is None else ranks.add_up(self._sums, self._inputs)
        return [
            total.to(tensor.dtype) if needed and total is not None else None
            for tensor, needed, total in zip(self._inputs, self._needs_grad, sums, strict=True)
        ]


def _bounds(box: Subscript) -> Bounds:
    return tuple((part.start, part.stop) for part in box)


def _is_partition(boxes: Sequence[Subscript], shape: Sequence[int]) -> bool:
    """Whether boxes, which are products of intervals along each dim, cover a tensor, and each element once.

    >>> halves = [(slice(0, 2),), (slice(2, 4),)]
    >>> _is_partition(halves, (4,)), _is_partition(halves, (5,)), _is_partition([halves[0], (slice(1, 4),)], (4,))
    (True, False, False)
    """
    intervals = [{part.indices(size)[:2] for part in along} for along, size in zip(zip(*boxes), shape)]
    count = math.prod(map(len, intervals))
    return count == len(boxes) > 1 and all(map(_is_split, intervals, shape))


def _is_split(intervals: Collection[tuple[int, int]], size: int) -> bool:
    """Whether intervals follow one another from 0 up to a size."""
    ordered = sorted(intervals)
    ends = [0, *(stop for _, stop in ordered)]
    return ends[-1] == size and [start for start, _ in ordered] == ends[:-1]
