"""Access patterns: what a box of an operator's result reads, and how the operator is evaluated on a box.

`AccessPattern` is a union. Each member says along every axis what one call yields (`produced`, `counts`, `lookup`)
and writes that call into a tile program (`emit`); nothing else asks which member it is. All have
`dims`, the tiled dims of the result; `reads`, the tensors that are read box by box, each cropped and padded before
the call; and what `_Pattern` says of pixels outside the image, of extents, and of how tight the claim is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import fx

from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import AxisExtent
from fxstream.rules.access import Average, Lookup, OutputSpan, Places, Read
from fxstream.rules.ops import average_windows, placed
from fxstream.rules.resample_table import Resample, TablePart, resampled_tile

__all__ = [
    "AccessPattern",
    "Averaged",
    "Bordered",
    "Combine",
    "Cropped",
    "Item",
    "Moved",
    "Pointwise",
    "Reduced",
    "Resampled",
    "Table",
    "TileWriter",
    "Windowed",
]

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Target = torch._ops.OpOverload


class TileWriter(Protocol):
    """What a pattern needs of the tile program that it writes one operator into."""

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """The reads of the pattern, cropped and padded."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operator's result on this tile."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the operator's result."""

    @property
    def counts(self) -> Sequence[Sequence[int] | None]:
        """Per axis, the divisors of the windows of an average."""

    @property
    def tables(self) -> Sequence[Sequence[fx.Node]]:
        """Per axis, the pixels and weights of a table."""

    @property
    def padding(self) -> Mapping[int, int]:
        """Tensor dims that the operator pads by itself, instead of reading a padded copy, and by how much."""

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function."""

    def operator(self, replaced: Mapping[str, Any], target: Target | None = None) -> fx.Node:
        """The model's operator, or another `target`, on the inputs, with these arguments replaced."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What all access patterns have in common; see the module's docstring."""

    dims: tuple[int, ...]
    reads: tuple[Read, ...]
    is_view: ClassVar[bool] = False
    """Whether the result shares the memory of the input."""
    joins_pixels: ClassVar[bool] = False
    """Whether it combines the same pixel of all of its reads."""
    is_item: ClassVar[bool] = False
    """Whether it is one of several results, of each of which a tile holds the same box."""
    reduces: ClassVar[bool] = False
    """Whether the result is combined from partial results of tiles."""

    @property
    def fill(self) -> float | None:
        """The value of pixels outside the image; None where nothing outside is read."""
        return None

    @property
    def extents(self) -> tuple[AxisExtent, ...] | None:
        """The result's pixels along each axis from those of the first read; None where they are the same."""
        return None

    @property
    def pads_itself(self) -> bool:
        """Whether the operator has a padding of its own that a tile may use."""
        return False

    @property
    def is_tight(self) -> bool:
        """Whether all that it claims to read has an influence."""
        return True

    def produced(self, axis: int, read: Interval, box: Interval) -> Interval:
        """The output pixels that the call yields for `box` when it is given `read` of its input."""
        return box

    def counts(self, axis: int, box: Interval, less: int = 0) -> tuple[int, ...] | None:
        """The divisors of an average along an axis; with `less`, of an input that has so many pixels less."""
        return None

    def lookup(self, axis: int, box: Interval, read: Interval) -> Lookup | None:
        """What a tile needs of a table along an axis."""
        return None


@dataclass(frozen=True, slots=True)
class Pointwise(_Pattern):
    """Each output pixel is computed from the same pixel of the inputs; `target` is called for the operator."""

    is_tight: bool = True
    target: Target | None = None
    joins_pixels: ClassVar[bool] = True

    def emit(self, tile: TileWriter) -> fx.Node:
        """The operator itself."""
        return tile.operator({}, self.target)


@dataclass(frozen=True, slots=True)
class Item(_Pattern):
    """One result of an operator that returns several; a tile holds the same box of each."""

    index: int = 0
    is_view: ClassVar[bool] = True
    is_item: ClassVar[bool] = True

    def emit(self, tile: TileWriter) -> fx.Node:
        """The item."""
        return tile.call(operator.getitem, tile.inputs[0], self.index)


@dataclass(frozen=True, slots=True)
class Moved(_Pattern):
    """The same pixels, with dims in other places; the argument `size`, if any, is the shape of the result.

    `replaced` are arguments that differ from the model's, `target` is called in the place of the model's operator.
    """

    size: str | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    is_view: ClassVar[bool] = True

    def emit(self, tile: TileWriter) -> fx.Node:
        """The operator, with the shape of the tile."""
        sizes = {} if self.size is None else {self.size: list(tile.shape)}
        return tile.operator({**self.replaced, **sizes}, self.target)


@dataclass(frozen=True, slots=True)
class Windowed(_Pattern):
    """Each output pixel reads a window: crop, pad with `fill`, call with the arguments in `replaced`.

    `size` names the argument that is the tiled dims of the result, if any; `target` is called in the place of the
    model's operator. One with a `padding` in `replaced`, whose windows lie along the last dims, may pad by itself.
    """

    extents: tuple[AxisExtent, ...] | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)
    fill: float | None = None
    size: str | None = None
    target: Target | None = None
    is_tight: bool = True

    @property
    def pads_itself(self) -> bool:
        """Whether it has a padding of its own."""
        return "padding" in self.replaced

    def emit(self, tile: TileWriter) -> fx.Node:
        """The operator without padding, or with that which a tile leaves to it."""
        replaced = dict(self.replaced)
        if self.size is not None:
            replaced[self.size] = [tile.shape[dim] for dim in sorted(self.dims)]
        if tile.padding:
            first = len(self.reads[0].value.shape) - len(replaced["padding"])
            replaced["padding"] = [tile.padding.get(first + i, p) for i, p in enumerate(replaced["padding"])]
        return tile.operator(replaced, self.target)


@dataclass(frozen=True, slots=True)
class Averaged(Windowed):
    """An average over windows, whose divisor at the border is the number of real pixels."""

    averages: tuple[Average, ...] = ()

    @property
    def pads_itself(self) -> bool:
        """Never: the divisors follow from the real pixels."""
        return False

    def counts(self, axis: int, box: Interval, less: int = 0) -> tuple[int, ...] | None:
        """The divisors along an axis."""
        return self.averages[axis].counts(box, less)

    def emit(self, tile: TileWriter) -> fx.Node:
        """The operator; where windows have fewer pixels than the kernel, their sums over the counts."""
        axes = list(zip(self.dims, self.averages, tile.counts, strict=True))
        if all(count == average.kernel for _, average, counts in axes for count in counts or ()):
            return Windowed.emit(self, tile)
        windows = tuple((average.kernel, average.stride, counts) for _, average, counts in sorted(axes))
        return tile.call(average_windows, tile.inputs[0], windows)


@dataclass(frozen=True, slots=True)
class Cropped(_Pattern):
    """A crop or a padding with one value, that is all: what is read is the result."""

    extents: tuple[AxisExtent, ...] | None = None
    fill: float | None = None

    def emit(self, tile: TileWriter) -> fx.Node:
        """What is read."""
        return tile.inputs[0]


@dataclass(frozen=True, slots=True)
class Bordered(_Pattern):
    """A padding with pixels of the image: a tile at the border also reads what is repeated or mirrored there.

    What it pads along other dims, with the arguments in `replaced`, the operator does.
    """

    spans: tuple[OutputSpan, ...]
    extents: tuple[AxisExtent, ...] | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)

    def produced(self, axis: int, read: Interval, box: Interval) -> Interval:
        """All that is read, padded."""
        return self.spans[axis].of(read)

    def emit(self, tile: TileWriter) -> fx.Node:
        """What is read, padded."""
        return tile.operator(self.replaced) if self.replaced else tile.inputs[0]


@dataclass(frozen=True, slots=True)
class Resampled(_Pattern):
    """Several output pixels per input pixel: crop, call with the arguments in `replaced`, crop the result.

    `size` names the argument that is the result's extents behind its channels, if any.
    """

    spans: tuple[OutputSpan, ...]
    extents: tuple[AxisExtent, ...] | None = None
    replaced: Mapping[str, Any] = field(default_factory=dict)
    fill: float | None = None
    size: str | None = None
    is_tight: bool = True

    def produced(self, axis: int, read: Interval, box: Interval) -> Interval:
        """What the call yields of this read."""
        return self.spans[axis].of(read)

    def emit(self, tile: TileWriter) -> fx.Node:
        """The operator on what is read."""
        sizes = {} if self.size is None else {self.size: [*tile.shape[2:]]}
        return tile.operator({**self.replaced, **sizes})


@dataclass(frozen=True, slots=True)
class Table(_Pattern):
    """A weighted sum of a few input pixels, looked up in a table along each axis."""

    axes: tuple[Resample, ...]
    extents: tuple[AxisExtent, ...] | None = None
    is_tight: bool = True

    def lookup(self, axis: int, box: Interval, read: Interval) -> Lookup | None:
        """The part of the table along an axis."""
        return TablePart(self.axes[axis], box, read)

    def emit(self, tile: TileWriter) -> fx.Node:
        """First along the axes that shrink most, so that the least is computed."""
        order = sorted(enumerate(self.axes), key=lambda pair: pair[1].extent_out / pair[1].extent)
        axes = [(self.dims[axis], tile.tables[axis]) for axis, _ in order]
        return tile.call(resampled_tile, tile.inputs[0], axes, tile.dtype)


@dataclass(frozen=True, slots=True)
class Reduced(_Pattern):
    """A reduction over space; boxes are those of the positions that it reduces, and `dims` their dims.

    A tile calls `partial_result` on what it reads and `arguments`. `combine` makes the whole result of the partial
    results, stacked in front, and of the number of positions of each (float64); it is differentiable in the first.
    Axes that are `kept` are dims of the result, here counted from the last, with their extents: a tile puts what
    it has in its place there, and `absent` values (one per result that is stacked in front) everywhere else.
    """

    partial_result: Callable[..., Any]
    combine: Combine
    arguments: tuple[Any, ...] = ()
    kept: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    absent: tuple[float, ...] = ()
    reduces: ClassVar[bool] = True

    def lookup(self, axis: int, box: Interval, read: Interval) -> Lookup | None:
        """Where the pixels of a kept axis lie."""
        return Places(box) if axis in self.kept else None

    def emit(self, tile: TileWriter) -> fx.Node:
        """The partial result of a tile."""
        partial = tile.call(self.partial_result, *tile.inputs, *self.arguments)
        places = tuple((*kept, tile.tables[axis][0]) for axis, kept in self.kept.items())
        return tile.call(placed, partial, self.absent, places) if places else partial


AccessPattern = Pointwise | Item | Moved | Windowed | Averaged | Cropped | Bordered | Resampled | Table | Reduced
"""All ways to evaluate an operator on a box."""
