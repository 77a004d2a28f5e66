"""Which window operators pad by themselves on a tile, which read a padded copy, and what halves are copied to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.typed_graph import TypedNode
from fxstream.machine.kernels.volumes import is_halved
from fxstream.tiling.axis_tiles import AxisTiles
from fxstream.tiling.bounds import AxisStep, Crop, CropPad
from fxstream.tiling.segment import Segment

__all__ = ["OwnPadding", "copies_of_halves", "own_padding", "padded_copies"]

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
    if not _pads(served) or before < 0 or after < 0 or before % stride or not served.crop.length:
        return None
    window = axis_map.last - axis_map.first + 1
    computed = (served.crop.length + 2 * width - window) // stride + 1
    grows = not node.is_tuple and node.values[0].elements > read.value.elements
    if computed - step.result.length > (0.0 if grows else MOST_EXTRA) * computed:
        return None
    return OwnPadding(width, Crop(before // stride + step.result.start, step.result.length, computed))


def padded_copies(segment: Segment, axes: Sequence[AxisTiles]) -> dict[str, float]:
    """Bytes of the largest padded copy of its input that each operator reads on any tile; none are left out."""
    copies: dict[str, float] = {}
    for index, name in enumerate(segment.nodes) if axes else ():
        reads = segment.graph[name].pattern.reads
        if len(reads) != 1 or all(one == IDENTITY for one in reads[0].maps):
            continue
        steps = [tiles.steps(index) for tiles in axes]
        if all(steps) and (pixels := _largest_copy(segment.graph[name], steps)):
            (read,) = reads  # its value may have tiled dims for this operator alone
            copies[name] = pixels * read.value.bytes / math.prod(read.extents)
    return copies


def copies_of_halves(segment: Segment, axes: Sequence[AxisTiles]) -> dict[str, tuple[float, float]]:
    """Bytes that each convolution which is done in halves needs besides where it is recorded, and in its backward.

    They are those of its result, and the larger of its result and its input, on the largest tile; without tiles of
    the whole.
    """
    copies = {}
    for index, name in enumerate(segment.nodes):
        node = segment.graph[name]
        if not node.halves or node.values[0].dtype != torch.float32:
            continue
        (read,), steps = node.pattern.reads, [tiles.steps(index) for tiles in axes]
        image, result = list(read.value.shape), list(node.values[0].shape)
        for dim, along in zip(read.dims, steps, strict=False):
            image[dim] = max(step.reads[0].crop.length + _pads(step.reads[0]) for step in along)
        for dim, along in zip(node.pattern.dims, steps, strict=False):
            result[dim] = max(step.result.full for step in along)
        if is_halved(image, segment.graph.value(node.inputs[1]).shape):
            made = 4.0 * math.prod(result)
            copies[name] = made, max(made, 4.0 * math.prod(image))
    return copies


def _largest_copy(node: TypedNode, steps: Sequence[Sequence[AxisStep]]) -> int:
    """Pixels of the largest padded copy; 0 where no tile makes one."""
    lengths = [[step.reads[0].crop.length + _pads(step.reads[0]) for step in along] for along in steps]
    largest = 0
    for axis, along in enumerate(steps):
        copied = [
            length
            for step, length in zip(along, lengths[axis], strict=True)
            if _pads(step.reads[0]) and own_padding(node, axis, step) is None
        ]
        others = math.prod(max(other) for k, other in enumerate(lengths) if k != axis)
        largest = max(largest, max(copied, default=0) * others)
    return largest


def _pads(read: CropPad) -> int:
    return read.before + read.after
