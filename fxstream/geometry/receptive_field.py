"""Which input pixels an output pixel depends on along one axis: of one operator, and composed through a graph.

One operator has an `AxisMap`. Output pixel ``o`` reads the input pixels

    floor((num * o + first) / den)  ..  floor((num * o + last) / den)      (both ends included)

in pixels of the operator's input, negative or beyond the extent where it reads padding. Convolution and
pooling have ``num=stride, den=1``; an upsampling by ``s`` has ``num=1, den=s``; a crop or pad is an
offset; ``num=0`` reads the same pixels whatever ``o`` is (a broadcast axis).

Maps of this form are not closed under composition once a strided operator follows an upsampling, but what they
compose to repeats: a `ReceptiveField` knows the reads of the first `period` output pixels, and that ``period``
pixels further on everything is read ``advance`` pixels further on. That form is closed under composition
(`ReceptiveField.then`) and under the hull of branches, in exact integers. Its stride is ``advance / period``.

Borders are ignored here: a field says what an output pixel far from them depends on. Tiles are planned by
propagating boxes (`demand`), which clips at every node.

Reference: Araujo, Norris, Sim, "Computing receptive fields of convolutional neural networks", Distill 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fxstream.errors import RuleError
from fxstream.geometry.box import EMPTY, Interval

__all__ = ["BROADCAST", "IDENTITY", "AxisExtent", "AxisMap", "ReceptiveField"]

MOST_PHASES = 2**14
"""A field that repeats after more output pixels than this has no form that anyone could use."""


@dataclass(frozen=True, slots=True)
class AxisMap:
    """The pixels read along one axis, as in the module's formula.

    >>> AxisMap(2, 1, -1, 1).read(Interval(0, 3))   # a 3-tap window with stride 2 and padding 1
    Interval(start=-1, stop=6)
    """

    num: int
    den: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.num < 0 or self.den < 1:
            raise RuleError(f"an access map needs num >= 0 and den >= 1, found {self}")
        if self.first > self.last:
            raise RuleError(f"an access map must read at least one pixel, found {self}")

    @classmethod
    def window(cls, kernel: int, stride: int, padding: int, dilation: int = 1) -> AxisMap:
        """The map of a window: `kernel` taps, `dilation` apart, `padding` pixels before the border."""
        return cls(stride, 1, -padding, -padding + dilation * (kernel - 1))

    @classmethod
    def shifted(cls, pixels: int) -> AxisMap:
        """The map that reads the one pixel `pixels` further on."""
        return cls(1, 1, pixels, pixels)

    def read(self, out: Interval) -> Interval:
        """All input pixels that the output pixels `out` read, padding included."""
        if not len(out):
            return EMPTY
        start = (self.num * out.start + self.first) // self.den
        return Interval(start, (self.num * (out.stop - 1) + self.last) // self.den + 1)


IDENTITY = AxisMap(1, 1, 0, 0)
BROADCAST = AxisMap(0, 1, 0, 0)


@dataclass(frozen=True, slots=True)
class AxisExtent:
    """How many pixels an operator's result has along one axis: ``floor((num * extent_in + offset) / den)``.

    >>> AxisExtent.window(kernel=3, stride=2, padding=1).of(224)
    112
    """

    num: int
    den: int
    offset: int

    @classmethod
    def window(cls, kernel: int, stride: int, padding: int, dilation: int = 1, ceil: bool = False) -> AxisExtent:
        """Of a window; under `ceil` the last one may reach beyond the padding but must start within."""
        span = dilation * (kernel - 1)
        offset = 2 * padding - span - 1 + stride
        return cls(1, stride, min(offset + stride - 1, padding + stride - 1) if ceil else offset)

    @classmethod
    def changed(cls, pixels: int) -> AxisExtent:
        """Of an operator that adds so many pixels, or takes them away."""
        return cls(1, 1, pixels)

    @classmethod
    def fixed(cls, pixels: int) -> AxisExtent:
        """Of an operator whose result has so many pixels whatever it is given."""
        return cls(0, 1, pixels)

    def of(self, extent: int) -> int:
        """The number of pixels of the result for `extent` pixels of the input."""
        return (self.num * extent + self.offset) // self.den

    def after(self, producer: AxisExtent) -> AxisExtent | None:
        """One formula for this operator applied to the result of `producer`; None where there is none.

        >>> AxisExtent.window(2, 2, 0).after(AxisExtent.window(3, 2, 1))
        AxisExtent(num=1, den=4, offset=1)
        """
        if self.num == 1:
            return AxisExtent(producer.num, producer.den * self.den, producer.offset + producer.den * self.offset)
        if producer.den == 1:
            return AxisExtent(producer.num * self.num, self.den, self.num * producer.offset + self.offset)
        return None


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """The pixels of a source that each pixel of a node depends on, along one axis.

    With ``o = period * q + r``, ``0 <= r < period``, pixel ``o`` depends on the source's pixels
    ``advance * q + lows[r] .. advance * q + highs[r]``. The period is the smallest possible.

    >>> stem = ReceptiveField.of_map(AxisMap.window(7, 2, 3))
    >>> deep = ReceptiveField.of_map(AxisMap.window(3, 2, 1)).then(stem)
    >>> deep.size, deep.stride, deep.halo, deep.padding
    (11, Fraction(4, 1), (5, 2), 5)
    """

    period: int
    advance: int
    lows: tuple[int, ...]
    highs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.period <= MOST_PHASES or len(self.lows) != self.period or len(self.highs) != self.period:
            raise RuleError(f"a receptive field of {self.period} phases is not supported")
        for shorter in range(1, self.period // 2 + 1):
            if self.period % shorter == 0 and self._repeats_after(shorter):
                object.__setattr__(self, "advance", self.advance * shorter // self.period)
                object.__setattr__(self, "period", shorter)
                object.__setattr__(self, "lows", self.lows[:shorter])
                object.__setattr__(self, "highs", self.highs[:shorter])
                break

    def _repeats_after(self, period: int) -> bool:
        moved, rest = divmod(self.advance * period, self.period)
        ends = (self.lows, self.highs)
        return not rest and all(e[r] == e[r - period] + moved for e in ends for r in range(period, self.period))

    @classmethod
    def of_map(cls, axis_map: AxisMap) -> ReceptiveField:
        """The field of one operator."""
        if axis_map.den > MOST_PHASES:
            raise RuleError(f"a receptive field of {axis_map.den} phases is not supported")
        reads = [axis_map.read(Interval(o, o + 1)) for o in range(axis_map.den)]
        lows, highs = tuple(read.start for read in reads), tuple(read.stop - 1 for read in reads)
        return cls(axis_map.den, axis_map.num, lows, highs)

    def low(self, pixel: int) -> int:
        """The first source pixel that `pixel` depends on."""
        q, r = divmod(pixel, self.period)
        return self.advance * q + self.lows[r]

    def high(self, pixel: int) -> int:
        """The last source pixel that `pixel` depends on."""
        q, r = divmod(pixel, self.period)
        return self.advance * q + self.highs[r]

    def read(self, out: Interval) -> Interval:
        """All source pixels that the pixels `out` depend on."""
        return Interval(self.low(out.start), self.high(out.stop - 1) + 1) if len(out) else EMPTY

    def then(self, producer: ReceptiveField) -> ReceptiveField:
        """The field in the source of `producer`, where this one is in pixels of `producer`'s node."""
        turns = producer.period // math.gcd(self.advance, producer.period)
        period = self.period * turns
        if period > MOST_PHASES:
            raise RuleError(f"a receptive field of {period} phases is not supported")
        return ReceptiveField(
            period,
            self.advance * turns * producer.advance // producer.period,
            tuple(producer.low(self.low(o)) for o in range(period)),
            tuple(producer.high(self.high(o)) for o in range(period)),
        )

    def hull(self, other: ReceptiveField) -> ReceptiveField:
        """What a pixel depends on through either of two branches. Raises `RuleError` if their strides differ."""
        if self.stride != other.stride:
            raise RuleError(f"branches of strides {self.stride} and {other.stride} have no common receptive field")
        period = math.lcm(self.period, other.period)
        return ReceptiveField(
            period,
            self.advance * period // self.period,
            tuple(min(self.low(o), other.low(o)) for o in range(period)),
            tuple(max(self.high(o), other.high(o)) for o in range(period)),
        )

    @property
    def stride(self) -> Fraction:
        """Source pixels from one pixel to the next, on average over the phases."""
        return Fraction(self.advance, self.period)

    @property
    def size(self) -> int:
        """The receptive field in source pixels; the largest of the phases."""
        return max(high - low + 1 for low, high in zip(self.lows, self.highs, strict=True))

    @property
    def sizes(self) -> tuple[int, int]:
        """The smallest and the largest receptive field of the phases."""
        sizes = [high - low + 1 for low, high in zip(self.lows, self.highs, strict=True)]
        return min(sizes), max(sizes)

    @property
    def padding(self) -> int:
        """The effective padding: how many pixels before the source pixel 0 depends on."""
        return -self.lows[0]

    @property
    def offset(self) -> Fraction:
        """The centre of the receptive field of pixel 0, in source pixels."""
        return Fraction(self.lows[0] + self.highs[0], 2)

    @property
    def halo(self) -> tuple[int, int]:
        """Source pixels read before and after a tile's own share, ``stride`` pixels per pixel of the node.

        Their sum is the overlap: what two adjacent tiles both read. Negative where a crop or a gap between
        windows leaves pixels of the share unread.
        """
        before = max(math.floor(self.stride * r) - low for r, low in enumerate(self.lows))
        after = max(high - math.ceil(self.stride * (r + 1)) + 1 for r, high in enumerate(self.highs))
        return before, after

    @property
    def overlap(self) -> int:
        """Source pixels that adjacent tiles both read; negative where pixels between them are not read."""
        return sum(self.halo)

    def tile_extent(self) -> tuple[Fraction, Fraction]:
        """``(a, b)``: a tile of ``t`` pixels holds ``a * t + b`` source pixels, whole periods from pixel 0 on."""
        return self.stride, Fraction(self.highs[-1] - self.lows[0] + 1 - self.advance)


def hull_of(fields: Sequence[ReceptiveField]) -> ReceptiveField:
    """The hull of one or more fields."""
    first, *others = fields
    for field in others:
        first = first.hull(field)
    return first
