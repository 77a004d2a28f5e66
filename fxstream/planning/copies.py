"""Bytes of the copies of their inputs and results that operators make on tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxstream.geometry.receptive_field import IDENTITY
from fxstream.graph.typed_graph import TypedNode
from fxstream.machine.kernels.volumes import is_halved
from fxstream.tiling.axes.bounds import AxisStep
from fxstream.tiling.own_padding import own_padding
from fxstream.tiling.segment import Segment
from fxstream.tiling.segment_plan import Tiles

__all__ = ["copies_of_halves", "padded_copies"]


def padded_copies(segment: Segment, axes: Sequence[Tiles]) -> dict[str, float]:
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


def _largest_copy(node: TypedNode, steps: Sequence[Sequence[AxisStep]]) -> int:
    """Pixels of the largest padded copy; 0 where no tile makes one."""
    lengths = [[step.reads[0].length for step in along] for along in steps]
    largest = 0
    for axis, along in enumerate(steps):
        copied = [
            length
            for step, length in zip(along, lengths[axis], strict=True)
            if step.reads[0].pads and own_padding(node, axis, step) is None
        ]
        others = math.prod(max(other) for k, other in enumerate(lengths) if k != axis)
        largest = max(largest, max(copied, default=0) * others)
    return largest


def copies_of_halves(segment: Segment, axes: Sequence[Tiles]) -> dict[str, tuple[float, float]]:
    """Bytes that each convolution which is done in halves needs besides where it is recorded, and in its backward.

    They are those of its result, and the larger of its result and its input, on the largest tile; without tiles of
    the whole.
    """
    copies = {}
    for index, name in enumerate(segment.nodes):
        node = segment.graph[name]
        steps = [tiles.steps(index) for tiles in axes] if node.halves else []
        if not node.halves or not all(steps):
            continue
        (read,) = node.pattern.reads
        image, result = list(read.value.shape), list(node.values[0].shape)
        for dim, along in zip(read.dims, steps, strict=False):
            image[dim] = max(step.reads[0].length for step in along)
        for dim, along in zip(node.pattern.dims, steps, strict=False):
            result[dim] = max(step.result.full for step in along)
        if is_halved(image, segment.graph.value(node.inputs[1]).shape):
            made, read_bytes = (float(node.values[0].dtype.itemsize * math.prod(s)) for s in (result, image))
            copies[name] = made, max(made, read_bytes)
    return copies
