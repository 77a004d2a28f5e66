"""What an operator reads of one tensor along each tiled dim, and what lies outside of the image there.

Coordinates: every access map speaks of pixels of the operator's own input and output.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from fxstream.errors import RuleError
from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import AxisMap

__all__ = ["Average", "Border", "Lookup", "OutputSpan", "Places", "Read", "Value"]


class Border(enum.Enum):
    """What an operator takes for the pixels of a read that lie outside the image."""

    FILLED = "constant"
    REPEATED = "replicate"
    MIRRORED = "reflect"
    CLIPPED = "none: it stays inside by itself"
    CLAMPED = "none: it reads the first two pixels where a pixel before the first is meant"

    def needed(self, read: Interval, extent: int) -> Interval:
        """`read` with the pixels of the image that stand for those outside; without these where they are clipped.

        >>> str(Border.MIRRORED.needed(Interval(-2, 1), 9)), str(Border.REPEATED.needed(Interval(-2, -1), 9))
        ('-2:3', '-2:1')
        """
        if not len(read) or self is Border.FILLED:
            return read
        start, stop = self.reflected(read.start, read.stop, extent)
        if self in (Border.CLIPPED, Border.CLAMPED):
            return Interval(start, stop).nearest(extent)
        return Interval(start, stop).hull(read.nearest(extent))

    def reflected(self, start: int, stop: int, extent: int) -> tuple[int, int]:
        """The pixels ``start .. stop - 1`` and those that lie as far inside the image as these lie outside."""
        begin, end = start, stop
        if start < 0 and self in (Border.MIRRORED, Border.CLAMPED):
            end = max(end, 1 - start)
        if stop > extent and self is Border.MIRRORED:
            begin = min(begin, 2 * extent - 1 - stop)
        return begin, end


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph: its node's name, its full shape, its type, and which of its dims are tiled.

    `dims[k]` is the tensor dim of tiled axis ``k``; a whole tensor has no tiled dim and ``dims == ()``. `image`
    says that the value depends on an image at all, tiled dims or not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int, ...] = ()
    image: bool = False

    def __post_init__(self) -> None:
        if len(set(self.dims)) != len(self.dims) or any(not 0 <= d < len(self.shape) for d in self.dims):
            raise RuleError(f"tiled dims {self.dims} do not fit the shape {self.shape} of {self.name}")

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels along each tiled dim."""
        return tuple(self.shape[d] for d in self.dims)

    @property
    def elements(self) -> int:
        """Numbers that the tensor holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes that the tensor holds."""
        return self.elements * self.dtype.itemsize

    @property
    def has_gradient(self) -> bool:
        """Whether a tensor of this type can have a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor argument that is read box by box.

    `argument` is its name in the operator's schema, `index` its place where the argument is a list. `dims` are its
    tiled dims, `maps` the access map along each, `border` what lies outside the image.
    """

    argument: str
    value: Value
    dims: tuple[int, ...]
    maps: tuple[AxisMap, ...]
    index: int | None = None
    border: Border = Border.FILLED

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.maps):
            raise RuleError(f"{self.value.name}: {len(self.maps)} access maps for tiled dims {self.dims}")

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels of the argument along each tiled dim."""
        return tuple(self.value.shape[d] for d in self.dims)

    def needed(self, axis: int, out: Interval, less: int = 0) -> Interval:
        """The pixels that output pixels `out` read along an axis, those outside the image included.

        With `less`, of an argument that has so many pixels less.
        """
        return self.border.needed(self.maps[axis].read(out), self.extents[axis] - less)


@dataclass(frozen=True, slots=True)
class OutputSpan:
    """Which output pixels an operator yields along one axis when it is called on input pixels ``p .. q - 1``.

    The result starts at output pixel ``scale * p + offset`` and ends before
    ``scale * (q - 1) + offset + extent``; what the tile does not need is cropped away.
    """

    scale: int
    offset: int
    extent: int

    def of(self, read: Interval) -> Interval:
        """The output pixels that a call on `read` yields."""
        start = self.scale * read.start + self.offset
        return Interval(start, self.scale * (read.stop - 1) + self.offset + self.extent)


@dataclass(frozen=True, slots=True)
class Average:
    """How many pixels the windows of an average pooling are divided by, along one axis."""

    kernel: int
    stride: int
    padding: int
    extent: int
    count_padding: bool

    def counts(self, out: Interval, less: int = 0) -> tuple[int, ...]:
        """The divisor of each output pixel in `out`; their products over the axes are the divisors.

        With `less`, of an image that has so many pixels less.
        """
        extent, padding = self.extent - less, self.padding if self.count_padding else 0
        low, high = -padding, extent + padding
        starts = (o * self.stride - self.padding for o in range(out.start, out.stop))
        return tuple(min(start + self.kernel, high) - max(start, low) for start in starts)


class Lookup(Hashable, Protocol):
    """What an operator takes along one axis that differs from tile to tile: inputs of the tile's program."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What `tensors` are."""

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """These inputs for one tile."""


@dataclass(frozen=True, slots=True)
class Places:
    """The pixels of an axis that a tile owns, by their positions."""

    owned: Interval

    @property
    def parts(self) -> tuple[str, ...]:
        """One tensor."""
        return ("places",)

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """The positions."""
        return [torch.arange(self.owned.start, self.owned.stop, device=device)]
