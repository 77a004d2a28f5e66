"""Flattened tensors and what they were before: `x.flatten(2)` joins the stream axes in one dim of positions.

A `Twin` of a flat tensor holds the same numbers in the same order, with the positions still apart: the flat tensor
is the twin, reshaped. So an operator that treats positions as nothing but positions can run on the twin instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

__all__ = ["Twin", "blocks"]


@dataclass(frozen=True, slots=True)
class Twin:
    """Dims `place`, `place + 1`, ... of `node`, of sizes `extents`, are dim `place` of the flat tensor.

    `space` are those of them that are stream axes, in the order of the axes, counted from `place`.
    """

    node: fx.Node
    place: int
    extents: tuple[int, ...]
    space: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many dims are one in the flat tensor."""
        return len(self.extents)

    @property
    def joined(self) -> list[int]:
        """The dims that are one in the flat tensor."""
        return list(range(self.place, self.place + self.width))

    @property
    def dims(self) -> tuple[int, ...]:
        """The stream dims."""
        return tuple(self.place + offset for offset in self.space)

    def shape(self, flat: Sequence[int]) -> tuple[int, ...]:
        """The shape of the twin of a tensor of this shape."""
        return (*flat[: self.place], *self.extents, *flat[self.place + 1 :])

    def dim(self, flat: int) -> int:
        """Where a dim of the flat tensor behind or before the positions is."""
        return flat if flat < self.place else flat + self.width - 1

    def at(self, node: fx.Node, place: int | None = None) -> Twin:
        """The twin of a result with the same positions."""
        return replace(self, node=node, place=self.place if place is None else place)

    def fits(self, other: Twin) -> bool:
        """Whether both have the same positions."""
        return self.extents == other.extents and self.space == other.space


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Which dims of a shape become which of another, in the smallest groups of equal product.

    >>> blocks((2, 12, 5, 7), (2, 3, 4, 35))
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 4), range(3, 4))]
    """
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        first_i, first_j = i, j
        i, j = i + 1, j + 1
        while (left := math.prod(before[first_i:i])) != (right := math.prod(after[first_j:j])):
            if left < right:
                i += 1
            else:
                j += 1
        found.append((range(first_i, i), range(first_j, j)))
    if found:
        (one, other) = found[-1]
        found[-1] = (range(one.start, len(before)), range(other.start, len(after)))
    return found
