"""The gradients of all inputs of a segment, summed over its tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxstream.io.source import Source
from fxstream.machine.copies import to_device
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Subscript

__all__ = ["Accumulator", "Contribution"]

Contribution = tuple[int, Subscript | None, torch.Tensor]
"""What one tile adds to a gradient: the input's index, the box that the tile read (None: all), the gradient."""


class Accumulator:
    """One sum per input that asks for a gradient; parameters of less than 32 bits are summed in float32.

    `add` either happens or does not, so that one that runs out of memory can be repeated; so can `add_all`, with
    what it left in its list.
    """

    def __init__(
        self,
        spatial: Sequence[torch.Tensor | Source],
        whole: Sequence[torch.Tensor],
        needs_grad: Sequence[bool],
        is_single: bool,
    ) -> None:
        self._inputs, self._needs_grad, self._is_single = (*spatial, *whole), needs_grad, is_single
        self._sums: list[torch.Tensor | None] = [None] * len(self._inputs)

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
        if total is None:
            total = self._sums[index] = torch.zeros_like(image)
        total[box].add_(to_device(gradient, total.device))

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
        sums = self._sums if ranks is None else ranks.add_up(self._sums, self._inputs)
        return [
            total.to(tensor.dtype) if needed and total is not None else None
            for tensor, needed, total in zip(self._inputs, self._needs_grad, sums, strict=True)
        ]
