"""What a rule is given and what it answers; the table that holds the rules.

A rule is a function from a `Call` (an operator call, its arguments named by the operator's schema, shapes
known) to a `Footprint` (what a box of the result reads and how the operator is evaluated on a box) or a
`Refusal` (why it cannot be evaluated on a box). Rules see concrete sizes, never tensors, and are asked once
per image size. An operator without a rule is never assumed local.

Coordinates: every access map speaks of pixels of the operator's own input and output.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxstream.errors import RuleError
from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import AxisExtent, AxisMap
from fxstream.rules.resample_table import Resample

__all__ = [
    "Average",
    "Border",
    "Call",
    "Evaluation",
    "Footprint",
    "Kind",
    "OpRule",
    "Production",
    "Read",
    "Reduction",
    "Refusal",
    "RuleTable",
    "TileSize",
    "Value",
]


class Kind(enum.Enum):
    """The verdict on a node: can a box of its result be computed from a box of its input?"""

    LOCAL = "local"
    SMALL = "small"
    REDUCE = "reduce"
    GLOBAL = "global"
    NO_RULE = "no rule"


class Evaluation(enum.Enum):
    """The closed set of ways to evaluate an operator on a box."""

    POINTWISE = "pointwise"
    WINDOWED = "windowed"
    RESAMPLED = "resampled"
    SHUFFLED = "shuffled"
    REDUCED = "reduced"


class TileSize(enum.Enum):
    """Stands for a size argument that follows the tile: filled in when a tile program is written."""

    RESULT = "the shape of the result"
    STREAM = "the stream dims of the result"


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
    """A tensor of the graph: its node's name, its full shape and which dims are stream axes.

    `dims[k]` is the tensor dim of stream axis ``k``; a small value has no stream axis and ``dims == ()``.
    `image` says that the value depends on an image at all, stream axes or not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int, ...] = ()
    image: bool = False

    def __post_init__(self) -> None:
        if len(set(self.dims)) != len(self.dims) or any(not 0 <= d < len(self.shape) for d in self.dims):
            raise RuleError(f"stream dims {self.dims} do not fit the shape {self.shape} of {self.name}")

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels along each stream axis."""
        return tuple(self.shape[d] for d in self.dims)


@dataclass(frozen=True, slots=True)
class Read:
    """One tensor argument that is read box by box.

    `argument` is its name in the operator's schema, `index` its place where the argument is a list.
    `dims` are its stream dims, `maps` the access map of each stream axis, `border` what lies outside the image.
    """

    argument: str
    value: Value
    dims: tuple[int, ...]
    maps: tuple[AxisMap, ...]
    index: int | None = None
    border: Border = Border.FILLED

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.maps):
            raise RuleError(f"{self.value.name}: {len(self.maps)} access maps for stream dims {self.dims}")

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels of the argument along each stream axis."""
        return tuple(self.value.shape[d] for d in self.dims)

    def needed(self, axis: int, out: Interval) -> Interval:
        """The pixels that output pixels `out` read along an axis, those outside the image included."""
        return self.border.needed(self.maps[axis].read(out), self.extents[axis])


@dataclass(frozen=True, slots=True)
class Production:
    """What a resampled operator yields along one axis when it is called on input pixels ``p .. q - 1``.

    The result starts at output pixel ``scale * p + offset`` and ends before
    ``scale * (q - 1) + offset + extent``; what was not asked for is cropped away.
    """

    scale: int
    offset: int
    extent: int

    def produce(self, read: Interval) -> Interval:
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

    def counts(self, out: Interval) -> tuple[int, ...]:
        """The divisor of each output pixel in `out`; their products over the axes are the divisors."""
        low, high = (-self.padding, self.extent + self.padding) if self.count_padding else (0, self.extent)
        starts = (o * self.stride - self.padding for o in range(out.start, out.stop))
        return tuple(min(start + self.kernel, high) - max(start, low) for start in starts)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the whole result of a reduction over space is made of the partial results of tiles.

    `combine` is given the partial results stacked in front and the number of positions of each (float64), and is
    differentiable in the first. `arguments` are those that a tile's call takes behind what it reads.
    """

    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Footprint:
    """A local operator: what a box of its result reads, and how the operator is evaluated on boxes.

    `dims` are the stream dims of the result. `target` is called on the cropped and padded inputs with the
    arguments in `overrides` replaced (an `Evaluation.WINDOWED` call has padding 0, for example); where it is
    None the cropped and padded input is itself the result. `fill` is the value of pixels outside the image. With
    `resample` the result is not the operator's own, but looked up in a table per axis.
    `extents` give the result's pixels along each axis from those of the first read; None where they are the
    same. A footprint that is not `tight` claims to read more than has an influence. `macs` are the
    multiply-accumulates of the whole call.

    Of a `reduction` over space, boxes are those of the positions that it reduces, and `dims` their dims; `target`
    yields the partial result of a box.
    """

    evaluation: Evaluation
    dims: tuple[int, ...]
    reads: tuple[Read, ...]
    target: Callable[..., Any] | None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    fill: float | None = None
    production: tuple[Production, ...] | None = None
    average: tuple[Average, ...] | None = None
    resample: tuple[Resample, ...] | None = None
    extents: tuple[AxisExtent, ...] | None = None
    tight: bool = True
    macs: int = 0
    reduction: Reduction | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an operator call cannot be evaluated on a box; `dims` are the stream dims its result keeps."""

    kind: Kind
    reason: str
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """An operator call as a rule sees it.

    `arguments` has every argument of the schema by name, defaults filled in, tensors as `Value`;
    `shapes` are the full shapes of the results (one unless the operator returns several).
    """

    name: str
    target: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        return self.shapes[0]

    def tensors(self) -> list[tuple[str, int | None, Value]]:
        """All tensor arguments as (argument, index in a list, value), in the order of the schema."""
        found: list[tuple[str, int | None, Value]] = []
        for argument, given in self.arguments.items():
            if isinstance(given, Value):
                found.append((argument, None, given))
            elif isinstance(given, (list, tuple)):
                found += [(argument, i, v) for i, v in enumerate(given) if isinstance(v, Value)]
        return found

    def spatial(self) -> list[Value]:
        """The tensor arguments that have stream axes."""
        return [value for _, _, value in self.tensors() if value.dims]

    def only_spatial(self, argument: str) -> bool:
        """Whether `argument` alone has stream axes, so that all the others are weights."""
        return all(name == argument for name, _, value in self.tensors() if value.dims)


Answer = Footprint | Refusal
Rule = Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class OpRule:
    """One row of the table: the operator (all its overloads), its family and its rule."""

    operator: str
    family: str
    rule: Rule


class RuleTable:
    """The rows by operator name, ``namespace::name``; a second row for an operator is an error."""

    def __init__(self) -> None:
        self._rows: dict[str, OpRule] = {}

    def add(self, operator: str, family: str, rule: Rule) -> OpRule:
        """Add one row. Raises `RuleError` for a name of the wrong form or one that is taken."""
        if operator.count("::") != 1:
            raise RuleError(f"an operator is named 'namespace::name', without overload; found {operator!r}")
        if operator in self._rows:
            raise RuleError(f"{operator} has a rule already, in the family {self._rows[operator].family!r}")
        row = OpRule(operator, family, rule)
        self._rows[operator] = row
        return row

    def remove(self, operator: str) -> None:
        """Take a row out again."""
        del self._rows[operator]

    def get(self, operator: str) -> OpRule | None:
        """The row of an operator, or None."""
        return self._rows.get(operator)

    def rows(self) -> tuple[OpRule, ...]:
        """All rows, sorted by family and name."""
        return tuple(sorted(self._rows.values(), key=lambda row: (row.family, row.operator)))
