"""Flattened tensors and what they were before: `x.flatten(2)` joins the stream axes in one dim of positions.

A `Twin` of a flat tensor holds the same numbers in the same order, with the positions still apart: the flat tensor
is the twin, reshaped. So an operator that treats positions as nothing but positions can run on the twin instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

__all__ = ["Twin"]


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
