"""The gradients of all inputs of a segment, summed over its tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxstream.io.source import Source
from fxstream.machine.copies import to_device
from fxstream.runtime.ranks import Ranks
from fxstream.runtime.schedule import Subscript

__all__ = ["Sums"]


class Sums:
    """One sum per input for which a gradient is wanted; parameters of less than 32 bits are summed in float32.

    Each addition is one step that either happens or does not, so that one that runs out of memory can be repeated.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor | Source],
        smalls: Sequence[torch.Tensor],
        wanted: Sequence[bool],
        is_single: bool,
    ) -> None:
        self._inputs, self._wanted = (*leaves, *smalls), wanted
        self._leaf_count, self._is_single = len(leaves), is_single
        self._sums: list[torch.Tensor | None] = [None] * len(self._inputs)

    def addition(self, place: int, box: Subscript | None, gradient: torch.Tensor) -> Callable[[], None]:
        """The step that adds what one tile gives for the input at `place`, or for the box of it that it read."""
        if box is None:
            return lambda: self._add_small(place, gradient)
        return lambda: self._add_leaf(place, box, gradient)

    def _add_leaf(self, place: int, box: Subscript, gradient: torch.Tensor) -> None:
        leaf, total = self._inputs[place], self._sums[place]
        assert isinstance(leaf, torch.Tensor)
        if self._is_single and gradient.shape == leaf.shape:
            self._sums[place] = to_device(gradient, leaf.device)
            return
        if total is None:
            total = self._sums[place] = torch.zeros_like(leaf)
        total[box].add_(to_device(gradient, total.device))

    def _add_small(self, place: int, gradient: torch.Tensor) -> None:
        total = self._sums[place]
        if self._is_single:
            self._sums[place] = gradient
        elif total is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[place] = gradient.to(wide, copy=True)
        else:
            total += gradient

    def gradients(self, ranks: Ranks | None = None) -> list[torch.Tensor | None]:
        """The sums, over all ranks, in the type of their input; None where nothing was asked for or flowed."""
        sums = self._sums if ranks is None else ranks.add_up(self._sums, self._inputs)
        return [
            total.to(given.dtype) if wants and total is not None else None
            for given, wants, total in zip(self._inputs, self._wanted, sums, strict=True)
        ]
