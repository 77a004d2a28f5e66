"""Access maps: which input pixels an output pixel reads along one axis.

Output pixel ``o`` reads the input pixels

    floor((num * o + first) / den)  ..  floor((num * o + last) / den)      (both ends included)

in pixels of the operator's input, negative or beyond the extent where it reads padding. Convolution and
pooling have ``num=stride, den=1``; an upsampling by ``s`` has ``num=1, den=s``; a crop or pad is an
offset; ``num=0`` reads the same pixels whatever ``o`` is (a broadcast axis).

Composition is closed as long as no step with ``num > 1`` follows one with ``den > 1``; `AxisMap.after` refuses
the rest, which is why tiles are planned by propagating boxes in integers and not by composed maps.

Reference: Araujo, Norris, Sim, "Computing receptive fields of convolutional neural networks", Distill 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxstream.box import EMPTY, Interval
from fxstream.errors import RuleError

__all__ = ["BROADCAST", "IDENTITY", "AxisMap"]


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

    def after(self, producer: AxisMap) -> AxisMap:
        """The map of this operator applied to the result of `producer`, without borders.

        Raises `RuleError` where the composition is not of this form.

        >>> AxisMap.window(3, 1, 1).after(AxisMap.window(3, 2, 1))
        AxisMap(num=2, den=1, first=-3, last=3)
        """
        if self.den == 1:
            num, den = producer.num * self.num, producer.den
            first = producer.num * self.first + producer.first
            last = producer.num * self.last + producer.last
        elif producer.num == 1:
            num, den = self.num, self.den * producer.den
            first = self.first + self.den * producer.first
            last = self.last + self.den * producer.last
        else:
            raise RuleError(f"{self} after {producer} has no closed form of one map")
        return AxisMap(num, den, first, last)


IDENTITY = AxisMap(1, 1, 0, 0)
BROADCAST = AxisMap(0, 1, 0, 0)
