"""Integer geometry of one axis and of products of axes.

An `Interval` is half-open, ``start <= i < stop``, in pixels of one named node along one stream axis. A
`Box` is a product of intervals, one per stream axis, so 1-D, 2-D and 3-D are the same code. Empty
intervals are values: they are the identity of the hull, and all of them are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["EMPTY", "Box", "Interval"]


@dataclass(frozen=True, slots=True)
class Interval:
    """The pixels ``start .. stop - 1`` of one axis.

    >>> Interval(2, 5).hull(Interval(7, 8))
    Interval(start=2, stop=8)
    >>> Interval(5, 2) == Interval(0, 0)
    True
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.stop <= self.start and (self.start or self.stop):
            object.__setattr__(self, "start", 0)
            object.__setattr__(self, "stop", 0)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def hull(self, other: Interval) -> Interval:
        """The smallest interval that holds both.

        >>> EMPTY.hull(Interval(3, 4))
        Interval(start=3, stop=4)
        """
        if not len(self):
            return other
        if not len(other):
            return self
        return Interval(min(self.start, other.start), max(self.stop, other.stop))

    def clip(self, extent: int) -> Interval:
        """The part inside an axis of `extent` pixels.

        >>> Interval(-2, 3).clip(10)
        Interval(start=0, stop=3)
        """
        return Interval(max(self.start, 0), min(self.stop, extent))

    def nearest(self, extent: int) -> Interval:
        """The part inside the axis, or the real pixel nearest to it where no part is.

        A read may lie wholly in padding; one real pixel then stands for its data type and batch.

        >>> Interval(-3, -1).nearest(10), Interval(12, 13).nearest(10)
        (Interval(start=0, stop=1), Interval(start=9, stop=10))
        """
        inside = self.clip(extent)
        if len(inside):
            return inside
        pixel = 0 if self.start < 0 else extent - 1
        return Interval(pixel, pixel + 1)

    def outside(self, extent: int) -> tuple[int, int]:
        """How many of its pixels lie before and after an axis of `extent` pixels.

        >>> Interval(-2, 12).outside(10), Interval(-3, -1).outside(10)
        ((2, 2), (2, 0))
        """
        before = min(self.stop, 0) - min(self.start, 0)
        after = max(self.stop, extent) - max(self.start, extent)
        return before, after

    def split(self, length: int) -> tuple[Interval, ...]:
        """Consecutive intervals of `length` pixels that partition this one; the last may be shorter.

        >>> [str(part) for part in Interval(0, 7).split(3)]
        ['0:3', '3:6', '6:7']
        """
        starts = range(self.start, self.stop, length)
        return tuple(Interval(start, min(start + length, self.stop)) for start in starts)


EMPTY = Interval(0, 0)


@dataclass(frozen=True, slots=True)
class Box:
    """A product of intervals, one per stream axis.

    >>> print(Box((Interval(0, 4), Interval(2, 9))))
    [0:4, 2:9]
    """

    intervals: tuple[Interval, ...]

    def __iter__(self) -> Iterator[Interval]:
        return iter(self.intervals)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.intervals))}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels along each axis."""
        return tuple(len(interval) for interval in self.intervals)

    def hull(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(tuple(a.hull(b) for a, b in zip(self, other, strict=True)))

    @classmethod
    def of(cls, subscript: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
        """The box of all dims that a subscript cuts from a tensor of this shape; missing slices are whole.

        >>> print(Box.of((slice(None), slice(1, 3)), (2, 4, 5)))
        [0:2, 1:3, 0:5]
        """
        whole = (*subscript, *[slice(None)] * (len(shape) - len(subscript)))
        bounds = [part.indices(size) for part, size in zip(whole, shape, strict=True)]
        return cls(tuple(Interval(start, stop) for start, stop, _ in bounds))

    def index(self, dims: tuple[int, ...], rank: int) -> tuple[slice, ...]:
        """The subscript that cuts this box from a tensor of `rank` whose stream dims are `dims`.

        >>> Box((Interval(1, 2),)).index((2,), 3)
        (slice(None, None, None), slice(None, None, None), slice(1, 2, None))
        """
        subscript = [slice(None)] * rank
        for dim, interval in zip(dims, self.intervals, strict=True):
            subscript[dim] = slice(interval.start, interval.stop)
        return tuple(subscript)
