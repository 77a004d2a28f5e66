"""Tiles of one shape, all of which run one program: what is compiled for one serves those at borders too.

NOTE [uniform tiles]
1. A uniform tile reads boxes of the same shape everywhere, inside the image, and its program is that of an image
   of this shape: each operator pads the box by itself, as it pads the image. Where the box ends with the image,
   that is the image's own padding. Elsewhere pixels near the edge of the box come out other than the image's; they
   are not needed, and are cut off when the program has run.
2. That smaller image is the image less some pixels: so many that the boxes of all values move by whole pixels
   along with it. Then strides and ceil_mode leave the same rest at the end of both.
3. It is exact for a tile that owns some outputs if the box of each value, as an ordinary tile holds it, is inside
   the tile's. For each pixel in the former reads pixels of the image that lie in an ordinary tile's boxes too, at
   the same distances, and pixels outside of the image, which are outside of the box. (A border that repeats or
   mirrors pixels of the image has these in the boxes.)
4. What is cut off gets a gradient of zero, and adds zeros to all gradients as long as every derivative there is
   finite. So it is for operators that are linear or smooth; of the pointwise ones these are listed.
5. It is not for what depends on places: tables, and reductions, of which each tile has a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxstream.geometry.box import EMPTY, Interval
from fxstream.graph.typed_graph import TypedNode
from fxstream.rules import Pointwise, Reduced, Table
from fxstream.tiling.axes.axis_tiles import AxisTiles
from fxstream.tiling.axes.bounds import AxisStep, AxisTile, BoundsPass, Crop, Ratio
from fxstream.tiling.segment import Segment, runs_operators_alone

__all__ = ["Moves", "UniformTiles", "may_be_uniform"]

COPIES = {"alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as", "expand", "cat", "stack"}
LINEAR = {"add", "sub", "rsub", "neg", "mul", "sum", "mean", "linear", "matmul", "batch_norm"}
BOUNDED = {"relu6", "hardtanh", "hardsigmoid", "sigmoid", "tanh", "sin", "cos", "clamp", "softmax", "threshold"}
RECTIFIED = {"relu", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"}
CHOSEN = {"maximum", "minimum", "clamp_min", "clamp_max", "amax", "amin", "abs", "square", "dropout"}
OTHERS = {"softplus", "log_softmax", "log_sigmoid", "layer_norm", "scaled_dot_product_attention"}
OF_THIS_PACKAGE = {"fxstream::normalise", "fxstream::dropout"}
FINITE = frozenset().union(COPIES, LINEAR, BOUNDED, RECTIFIED, CHOSEN, OTHERS, OF_THIS_PACKAGE)
"""Pointwise operators whose results and derivatives are finite where what they read is."""


def may_be_uniform(segment: Segment) -> bool:
    """Whether the tiles of a segment may compute pixels that they do not need (rules 4 and 5)."""
    return runs_operators_alone(segment) and all(_is_finite(segment.graph[name]) for name in segment.nodes)


def _is_finite(node: TypedNode) -> bool:
    pattern, verdict = node.pattern, node.verdict
    assert verdict is not None
    if not isinstance(pattern, Pointwise):
        return not isinstance(pattern, (Reduced, Table))
    name = verdict.operator.removeprefix("aten::")
    return name in FINITE or (name == "div" and [read.argument for read in pattern.reads] == ["self"])


@dataclass(frozen=True, slots=True)
class Moves:
    """How boxes move together: each by `pixels` of its own where the finest output moves by `unit`.

    `whole` is the tile that owns all.
    """

    whole: AxisTile
    pixels: Mapping[str, int]
    unit: int

    @classmethod
    def of(cls, whole: AxisTile, ratios: Mapping[str, Ratio]) -> Moves:
        """From the pixels by which each box moves per pixel of the finest output."""
        unit = math.lcm(*(den for _, den in ratios.values()))
        return cls(whole, {name: num * unit // den for name, (num, den) in ratios.items()}, unit)

    def room(self, tile: AxisTile) -> tuple[int, int]:
        """How many moves later than the whole the boxes of a tile all begin, and how many earlier they end."""
        ends = [(box, self.whole.boxes[n], self.pixels[n]) for n, box in tile.boxes.items() if self.pixels[n]]
        before = min(((box.start - whole.start) // pixels for box, whole, pixels in ends), default=0)
        after = min(((whole.stop - box.stop) // pixels for box, whole, pixels in ends), default=0)
        return before, after


class UniformTiles(Sequence[AxisTile]):
    """Tiles along one axis that own what others do, with boxes of one shape.

    The image of rule 2 is shorter by `less` moves. `length` are the pixels of the finest output of a tile inside.
    """

    def __init__(self, tiles: AxisTiles, walk: BoundsPass, moves: Moves, length: int) -> None:
        self._tiles, self._moves, self.length = tiles, moves, length
        self._outputs = walk.segment.outputs
        self._less = min(map(sum, map(moves.room, (tiles[i] for i in tiles.places))))
        less = {name: self._less * pixels for name, pixels in moves.pixels.items()}
        self._boxes = {n: Interval(b.start, max(b.start, b.stop - less[n])) for n, b in moves.whole.boxes.items()}
        self._steps = tuple(walk.step(i, self._boxes, less) for i in range(len(walk.segment.nodes)))

    @property
    def is_possible(self) -> bool:
        """Whether boxes are smaller than all of the image, and none is empty."""
        return self._less > 0 and all(map(len, self._boxes.values()))

    def __len__(self) -> int:
        return len(self._tiles)

    def __getitem__(self, i: int) -> AxisTile:  # type: ignore[override]
        return self._tile(self._tiles[i])

    def __iter__(self) -> Iterator[AxisTile]:
        return map(self._tile, self._tiles)

    def _tile(self, tile: AxisTile) -> AxisTile:
        """The uniform tile that owns what an ordinary one does, as far on as that one's boxes allow."""
        moves = min(self._less, self._moves.room(tile)[0])
        on = {name: moves * self._moves.pixels[name] for name in self._boxes}
        boxes = {n: Interval(box.start + on[n], box.stop + on[n]) for n, box in self._boxes.items()}
        yields = tuple(boxes[name] for name in self._outputs)
        crops = tuple(Crop(0, len(box), len(box)) for box in yields)
        return AxisTile(tile.outputs, boxes, self._steps, crops, yields)

    def largest(self, name: str) -> int:
        """The interval that each tile holds of a node or spatial input."""
        return len(self._boxes.get(name, EMPTY))

    def total(self, name: str) -> float:
        """The pixels of a node or spatial input that all tiles together hold."""
        return float(len(self) * self.largest(name))

    def steps(self, index: int) -> list[AxisStep]:
        """How a node, given by its index in the segment, is evaluated on each tile."""
        return [step for step in (self._steps[index],) if step is not None]
