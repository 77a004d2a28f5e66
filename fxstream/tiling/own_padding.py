"""Which window operators pad by themselves on a tile; others read a padded copy of their input."""

from __future__ import annotations

from dataclasses import dataclass

from fxstream.graph.typed_graph import TypedNode
from fxstream.tiling.axes.bounds import AxisStep, Crop

__all__ = ["OwnPadding", "own_padding"]

MOST_EXTRA = 1 / 8
"""An operator may compute this share of a tile's result in excess to save a padded copy of its input.

Only where its result is no larger than the input: the backward of the crop is a copy of the gradient of the
result.
"""


@dataclass(frozen=True, slots=True)
class OwnPadding:
    """The operator's own padding along one axis, and the crop of what it then yields."""

    width: int
    result: Crop


def own_padding(node: TypedNode, axis: int, step: AxisStep) -> OwnPadding | None:
    """The padding that an operator does by itself along an axis, instead of reading a padded copy.

    It pads both sides, so that on a side where the image goes on it yields pixels in excess, which are cropped: a
    share of the result up to `MOST_EXTRA`.
    """
    pattern = node.pattern
    if not pattern.pads_itself:
        return None
    (read,), (served,) = pattern.reads, step.reads
    axis_map = read.maps[axis]
    width, stride = -axis_map.first, axis_map.num
    before, after = width - served.before, width - served.after
    if not served.pads or before < 0 or after < 0 or before % stride or not served.crop.length:
        return None
    window = axis_map.last - axis_map.first + 1
    computed = (served.crop.length + 2 * width - window) // stride + 1
    grows = not node.is_tuple and node.values[0].elements > read.value.elements
    if computed - step.result.length > (0.0 if grows else MOST_EXTRA) * computed:
        return None
    return OwnPadding(width, Crop(before // stride + step.result.start, step.result.length, computed))
